"""How the terminal demo looks: text coloured by the experts each token used, wrapped by words, a line per layer, a
line of figures. Pure functions of numbers and strings."""

import dataclasses
import math
import statistics
import unicodedata
from collections.abc import Iterable, Sequence

from foundation.console import COLOUR, escaped

# Eight steps of a colour-blind-safe sequential scale (after ColorBrewer's YlGnBu: lightness falls all the way) as
# 256-colour backgrounds with a readable foreground.
SCALE = ((230, 16), (193, 16), (151, 16), (115, 16), (73, 16), (31, 231), (25, 231), (18, 231))
BLOCKS = "▁▂▃▄▅▆▇█"
RESET = "\x1b[0m"
# A stretch of text of one token, and its number of experts; None for the prompt.
Run = tuple[str, float | None]


@dataclasses.dataclass(frozen=True)
class Palette:
    """Maps a number of experts to a step of a fixed scale: the same colour is the same number in every text.

    Attributes:
        cap: number of experts at the end of the scale, which begins at 0.
        colours: ANSI colours; otherwise the number is written behind the token.
    """

    cap: float
    colours: bool

    def step(self, experts: float) -> int:
        """0 (no experts) to the last step (the cap)."""
        return min(max(int(experts / max(self.cap, 1e-9) * len(SCALE)), 0), len(SCALE) - 1)

    def paint(self, text: str, experts: float | None) -> str:
        """The token's text in its colour, or followed by its number in brackets; what it holds of control characters
        is escaped."""
        text = escaped(text)
        if experts is None:
            return text
        if not self.colours:
            return f"{text}[{experts:.0f}]"
        background, foreground = SCALE[self.step(experts)]
        coloured = f"\x1b[48;5;{background}m\x1b[38;5;{foreground}m"
        # A background must not run on behind the end of a line.
        return coloured + text.replace("\n", f"{RESET}\n{coloured}") + RESET

    def legend(self) -> str:
        """One line that explains the colours or the numbers."""
        if not self.colours:
            return "experts per token: the number in brackets behind each token"
        bounds = [self.cap * step / len(SCALE) for step in range(len(SCALE))]
        steps = "".join(f"\x1b[48;5;{b}m\x1b[38;5;{f}m {low:<3.0f}{RESET}" for low, (b, f) in zip(bounds, SCALE))
        return f"experts per token: {steps} {self.cap:g}"

    def spark(self, experts: Sequence[float]) -> str:
        """A bar per token, as high as its share of the cap; a dot for none."""
        steps = [math.ceil(n / max(self.cap, 1e-9) * len(BLOCKS)) for n in experts]
        return "".join("·" if step <= 0 else BLOCKS[min(step, len(BLOCKS)) - 1] for step in steps)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures printed below the text.

    Attributes:
        tokens: generated.
        mean_experts: over the generated tokens and the layers where the number varies.
        budget: the mean asked for; None when the trained policy runs as it is.
        bits_per_byte: that the model spends on its own text; NaN for a text without bytes.
        milliseconds: median of the forward pass per decoded token.
        cache_bytes: of the model's cache after these tokens.
        full_attention_bytes: of the same model's cache with full attention in every layer.
        static: every token gets the same number.
    """

    tokens: int
    mean_experts: float
    budget: float | None
    bits_per_byte: float
    milliseconds: float
    cache_bytes: int
    full_attention_bytes: int
    static: bool = False

    def parts(self) -> list[str]:
        """One figure each."""
        asked = "as trained" if self.budget is None else f"budget {self.budget:g}"
        saved = 1 - self.cache_bytes / self.full_attention_bytes
        return [
            f"{self.tokens} tokens",
            f"mean experts {self.mean_experts:.2f} ({asked}{', the same for all' if self.static else ''})",
            f"{self.bits_per_byte:.2f} bits per byte",
            f"{self.milliseconds:.2f} ms per token",
            f"cache {self.cache_bytes:,} bytes, full attention {self.full_attention_bytes:,} ({saved:.1%} saved)",
        ]

    def __str__(self) -> str:
        return " | ".join(self.parts())


ENDS = {
    "document": "end of the document: the model closed it",
    "length": "as many tokens as asked for",
    "stop": "stopped here",
}


def shown(piece: str) -> str:
    """A token's text without what stands for broken bytes: half a character is never shown."""
    return piece.replace("\ufffd", "")


def cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + _is_wide(c)
        for c in text
    )


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def wrapped(runs: Iterable[Run], width: int) -> list[list[Run]]:
    """Lines of at most `width` columns. Words stay whole, unless one is longer than a line; between wide characters,
    whose scripts write no spaces, a line may end anywhere."""
    lines: list[list[Run]] = [[]]
    used, word, word_cells = 0, [], 0

    def place() -> None:
        nonlocal used, word, word_cells
        if used and used + word_cells > width:
            lines.append([])
            used = 0
        for character, experts in word:
            if used + cells(character) > width:
                lines.append([])
                used = 0
            _append(lines[-1], character, experts)
            used += cells(character)
        word, word_cells = [], 0

    for text, experts in runs:
        for character in escaped(text).replace("\t", "    "):
            if character == "\n":
                place()
                lines.append([])
                used = 0
            elif character == " " or _is_wide(character):
                place()
                # A space that would begin a line only because the one before is full is left out.
                if character == " " and used >= width:
                    continue
                word, word_cells = [(character, experts)], cells(character)
                place()
            else:
                word.append((character, experts))
                word_cells += cells(character)
    place()
    return lines


def _append(line: list[Run], text: str, experts: float | None) -> None:
    if line and line[-1][1] == experts:
        line[-1] = (line[-1][0] + text, experts)
    elif text:
        line.append((text, experts))


@dataclasses.dataclass
class Pane:
    """One text as it grows, and what was measured of it.

    Attributes:
        title: what runs.
        runs: the prompt and the tokens.
        layers: experts of each token so far, by layer.
        summary: the figures; None before the first token.
        note: how it ended, or what it is doing.
    """

    title: str
    runs: list[Run]
    layers: dict[int, list[int]]
    summary: Summary | None = None
    note: str = ""


def frame(panes: Sequence[Pane], palette: Palette, head: Sequence[str], foot: str, size: tuple[int, int]) -> list[str]:
    """The lines of a screen: head, panes side by side, foot.

    Args:
        size: columns and lines of the terminal.
    """
    columns, rows = max(size[0], 20), max(size[1], 8)
    width = (columns - 3 * (len(panes) - 1)) // len(panes)
    head = [part for line in head for part in _within(line, columns)]
    most_layers = max(1, rows // 3)
    blocks = []
    for pane in panes:
        below = [*spark_lines(pane, palette, width, most_layers), *figure_lines(pane, width)]
        room = max(1, rows - len(head) - 3 - len(below))
        lines = wrapped(pane.runs, width)[-room:]
        painted = [_padded(line, palette, width) for line in lines]
        block = [_fitted(pane.title, width), *painted, *[" " * width] * (room - len(painted))]
        blocks.append([*block, *(_fitted(line, width) for line in below)])
    deepest = max(map(len, blocks))
    for block in blocks:
        block[-1:-1] = [" " * width] * (deepest - len(block))
    body = [" │ ".join(parts) for parts in zip(*blocks)]
    return [*head, *body, _fitted(foot, columns)]


def spark_lines(pane: Pane, palette: Palette, width: int, most: int) -> list[str]:
    """A line per layer: its last tokens' experts and their mean; of many layers the first ones."""
    lines = []
    for layer, experts in list(pane.layers.items())[:most]:
        if experts:
            name, mean = f"layer {layer:<3}", f" {statistics.fmean(experts):5.1f}"
            lines.append(name + palette.spark(experts[-max(width - len(name) - len(mean), 1) :]) + mean)
    return lines


def figure_lines(pane: Pane, width: int) -> list[str]:
    """The figures, as many on a line as fit, and the note."""
    lines: list[str] = []
    for part in [] if pane.summary is None else pane.summary.parts():
        if lines and cells(lines[-1]) + 3 + cells(part) <= width:
            lines[-1] += f" | {part}"
        else:
            lines += _plain(part, width)
    return [*lines, *(_plain(pane.note, width) or [""])]


def _plain(text: str, width: int) -> list[str]:
    return ["".join(part for part, _ in line) for line in wrapped([(text, None)], width)]


def _padded(line: list[Run], palette: Palette, width: int) -> str:
    # Without colours there is no room for numbers on a screen: they stand in the lines of the layers.
    painted = "".join(palette.paint(text, experts if palette.colours else None) for text, experts in line)
    return painted + " " * max(width - sum(cells(text) for text, _ in line), 0)


def _within(line: str, width: int) -> list[str]:
    """A line as it is, or several; one that is too wide without its colours."""
    bare = COLOUR.sub("", line)
    return [line] if cells(bare) <= width and "\x1b" in line else [_fitted(part, width) for part in _plain(bare, width)]


def _fitted(text: str, width: int) -> str:
    """Cut or filled to a width."""
    while cells(text) > width:
        text = text[:-1]
    return text + " " * (width - cells(text))
