"""The layer plan: which kind of attention each layer of a model has, as one letter per layer.

The letters are those of `attention.kinds`.
"""

import dataclasses
from collections.abc import Sequence

from attention.config import AttentionConfig
from attention.kind import AttentionKind
from attention.kinds import KINDS, describe_letters


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One letter per layer, lowest layer first.

    Attributes:
        letters: one of `KINDS` per layer.
        source: the layer whose state layer i decodes from: i itself unless its kind reads another's.
    """

    letters: tuple[str, ...]
    source: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, n_layers: int) -> "LayerPlan":
        """Repeats the pattern `text` to `n_layers` layers: "SSSF" at 6 layers is S S S F S S.

        Raises:
            ValueError: for an empty pattern, fewer than 1 layer, an unknown letter, or a kind that reads another's keys
                and values with none of that kind below it; names the letter and its place.
        """
        if not text:
            raise ValueError(f"layer plan {text!r} is empty; legal: a pattern of the letters {describe_letters()}")
        if n_layers < 1:
            raise ValueError(f"layer plan {text!r}: n_layers={n_layers}; legal: at least 1")
        for place, letter in enumerate(text):
            if letter not in KINDS:
                raise ValueError(
                    f"layer plan {text!r}: unknown letter {letter!r} at place {place} (counted from 0); legal:"
                    f" {describe_letters()}"
                )
        letters = tuple(text[index % len(text)] for index in range(n_layers))
        source: list[int] = []
        newest: dict[str, int] = {}
        for index, letter in enumerate(letters):
            newest[letter] = index
            owner = KINDS[letter].reads or letter
            if owner not in newest:
                raise ValueError(
                    f"layer plan {text!r}: {letter!r} at place {index} (counted from 0) needs {owner!r} below it:"
                    f" {KINDS[letter].sentence}"
                )
            source.append(newest[owner])
        return cls(letters=letters, source=tuple(source))

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """What the letters stand for."""
        return tuple(KINDS[letter] for letter in self.letters)

    def check(self, configs: Sequence[AttentionConfig]) -> None:
        """Refuses configurations, one per layer, that the planned layers cannot have.

        Raises:
            ValueError: for another number of them than of layers, one that its layer's kind cannot have, or a layer
                that reads another's keys and values but disagrees with it on what they look like; names the layers and
                the fields.
        """
        if len(configs) != len(self.letters):
            raise ValueError(f"{len(configs)} attention configurations for {len(self.letters)} layers; legal: one each")
        for index, (kind, source, config) in enumerate(zip(self.kinds, self.source, configs)):
            kind.check(config)
            wrong = [
                f"{field} is {getattr(config, field)}, not {getattr(configs[source], field)}"
                for field in kind.shared_fields
                if getattr(config, field) != getattr(configs[source], field)
            ]
            if wrong:
                raise ValueError(
                    f"layer {index} ({kind.letter}) reads the keys and values of layer {source}"
                    f" ({self.letters[source]}), but {'; '.join(wrong)}; legal: the same in both"
                )
