"""How the terminal demo looks: text coloured by the experts each token used, a legend, a summary line. Pure functions
of numbers and strings."""

import dataclasses

from foundation.console import escaped

# Five steps of a colour-blind-safe sequential scale (ColorBrewer YlGnBu) as 256-colour backgrounds, light to dark, with
# a readable foreground.
SCALE = ((230, 16), (151, 16), (79, 16), (32, 231), (24, 231))


@dataclasses.dataclass(frozen=True)
class Palette:
    """Maps a number of experts to one of five steps between the bounds.

    Attributes:
        low, high: numbers of experts at the two ends of the scale; everything beyond takes the end's colour.
        colours: ANSI colours; otherwise the number is written behind the token.
    """

    low: float
    high: float
    colours: bool

    def step(self, experts: float) -> int:
        """0 (few experts) to 4 (many)."""
        share = (experts - self.low) / max(self.high - self.low, 1e-9)
        return min(max(int(share * len(SCALE)), 0), len(SCALE) - 1)

    def paint(self, text: str, experts: float) -> str:
        """The token's text in its colour, or followed by its number in brackets; what it holds of control characters
        is escaped."""
        text = escaped(text)
        if not self.colours:
            return f"{text}[{experts:.0f}]"
        background, foreground = SCALE[self.step(experts)]
        coloured = f"\x1b[48;5;{background}m\x1b[38;5;{foreground}m"
        # A background must not run on behind the end of a line.
        return coloured + text.replace("\n", f"\x1b[0m\n{coloured}") + "\x1b[0m"

    def legend(self) -> str:
        """One line that explains the colours or the numbers."""
        if not self.colours:
            return "experts per token: the number in brackets behind each token"
        width = (self.high - self.low) / len(SCALE)
        bounds = [self.low + width * step for step in range(len(SCALE))]
        return "experts per token: " + " ".join(
            f"\x1b[48;5;{b}m\x1b[38;5;{f}m {low:4.1f}+ \x1b[0m" for low, (b, f) in zip(bounds, SCALE)
        )


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures printed below the text.

    Attributes:
        mean_experts: over the generated tokens and the coloured layers.
        budget: the mean asked for; None when the trained policy runs as it is.
        milliseconds: median per decoded token.
        cache_bytes: of the model's cache at the end.
        full_attention_bytes: of the same model's cache with full attention in every layer.
    """

    mean_experts: float
    budget: float | None
    milliseconds: float
    cache_bytes: int
    full_attention_bytes: int

    def __str__(self) -> str:
        asked = "as trained" if self.budget is None else f"budget {self.budget:g}"
        saved = 1 - self.cache_bytes / self.full_attention_bytes
        return (
            f"mean experts {self.mean_experts:.2f} ({asked}) | {self.milliseconds:.1f} ms per token | "
            f"cache {self.cache_bytes:,} bytes, full attention {self.full_attention_bytes:,} ({saved:.1%} saved)"
        )
