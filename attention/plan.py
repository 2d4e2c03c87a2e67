"""The layer plan: which kind of attention each layer of a model has, as one letter per layer."""

import dataclasses

# Letters and what they stand for; the layer that each builds is in attention/build.py.
LETTERS = {
    "F": "full softmax attention",
    "S": "sliding-window softmax attention",
    "R": "full attention that reuses the keys and values of the nearest F below",
    "r": "sliding-window attention that reuses the keys and values of the nearest S below",
    "L": "lightning attention (linear, fixed decay)",
    "G": "gated DeltaNet (linear, delta rule, decay per head)",
    "K": "Kimi delta attention (linear, delta rule, decay per key channel)",
    "M": "mixed: softmax heads (full or sliding) and lightning heads side by side",
}
# Letters that own no keys and values, and whose they read.
OWNER = {"R": "F", "r": "S"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One letter per layer, lowest layer first.

    Attributes:
        letters: one of `LETTERS` per layer.
        source: the layer whose keys and values layer i reads: i itself unless its letter is R or r.
    """

    letters: tuple[str, ...]
    source: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, n_layers: int) -> "LayerPlan":
        """Repeats the pattern `text` to `n_layers` layers: "SSSF" at 6 layers is S S S F S S.

        Raises:
            ValueError: for an empty pattern, fewer than 1 layer, an unknown letter, or R (r) with no F (S) below it;
                names the letter and its place.
        """
        if not text:
            raise ValueError(f"layer plan {text!r} is empty; legal: a pattern of the letters {_legal()}")
        if n_layers < 1:
            raise ValueError(f"layer plan {text!r}: n_layers={n_layers}; legal: at least 1")
        for place, letter in enumerate(text):
            if letter not in LETTERS:
                raise ValueError(
                    f"layer plan {text!r}: unknown letter {letter!r} at place {place} (counted from 0); legal:"
                    f" {_legal()}"
                )
        letters = tuple(text[index % len(text)] for index in range(n_layers))
        source: list[int] = []
        newest: dict[str, int] = {}
        for index, letter in enumerate(letters):
            newest[letter] = index
            owner = OWNER.get(letter, letter)
            if owner not in newest:
                raise ValueError(
                    f"layer plan {text!r}: {letter!r} at place {index} (counted from 0) needs {owner!r} below it:"
                    f" {LETTERS[letter]}"
                )
            source.append(newest[owner])
        return cls(letters=letters, source=tuple(source))


def _legal() -> str:
    return ", ".join(f"{letter} ({meaning})" for letter, meaning in LETTERS.items())
