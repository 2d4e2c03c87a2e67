"""The cheap settings whose answers are compared with those of full runs."""

import dataclasses
from itertools import product

from ablations.comparison.reliability import form_of
from foundation.serialize import nearest
from lm.options import ModelOptions
from staged_training.schedule import Anneal
from staged_training.staging import StagingConfig

# Of the tuned learning rate.
SMALL_RATE = 1 / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to compare arms for less than full runs.

    Attributes:
        trunk_share: where branches leave the trunk, as a share of the tokens; None for a smaller model that is trained
            whole, the classical proxy, to which nothing below applies.
        freeze: share of the parameters that is frozen in the branches.
        anneal: how branches end.
        small_rate: a third of the learning rate, of trunk and branches alike, as of someone who did not tune it.
    """

    trunk_share: float | None
    freeze: float = 0.0
    anneal: Anneal = "decay"
    small_rate: bool = False

    @property
    def name(self) -> str:
        """In tables and on the command line: `fork85_freeze50_decay`."""
        if self.trunk_share is None:
            return "smaller_model"
        form = form_of(self.staging(StagingConfig()))
        return f"{form}_small_rate" if self.small_rate else form

    def staging(self, full: StagingConfig) -> StagingConfig:
        """How the budget of a full run is spent instead."""
        if self.trunk_share is None:
            return full
        return dataclasses.replace(
            full,
            trunk_share=self.trunk_share,
            freeze=self.freeze,
            anneal=self.anneal,
            learning_rate=full.learning_rate * (SMALL_RATE if self.small_rate else 1),
        )


SMALLER_MODEL = Setting(trunk_share=None)
SMALL = (
    SMALLER_MODEL,
    *(Setting(trunk_share=0.85, freeze=freeze) for freeze in (0.0, 0.5, 0.85)),
    Setting(trunk_share=0.7, freeze=0.5),
    Setting(trunk_share=0.85, freeze=0.5, anneal="merge"),
    Setting(trunk_share=0.85, freeze=0.5, small_rate=True),
)
LARGE = (
    SMALLER_MODEL,
    *(
        Setting(trunk_share=share, freeze=freeze, anneal=anneal, small_rate=small)
        for small, share, anneal, freeze in product(
            (False, True), (0.7, 0.85, 0.9), ("decay", "merge"), (0.0, 0.5, 0.85)
        )
    ),
)
SETTINGS = {setting.name: setting for setting in LARGE}


def find_settings(names: tuple[str, ...]) -> tuple[Setting, ...]:
    """The named settings; duplicates count once.

    Raises:
        ValueError: for an unknown name, with the nearest legal one.
    """
    if unknown := [name for name in names if name not in SETTINGS]:
        raise ValueError(f"--settings: no setting {unknown[0]!r}; {nearest(unknown[0], SETTINGS)}")
    return tuple(SETTINGS[name] for name in dict.fromkeys(names))


def smaller(model: ModelOptions) -> ModelOptions:
    """Half of every width, about a quarter of the FLOPs; layers, heads, experts and k stay, so that every arm asks the
    same question of it.

    Raises:
        ValueError: for a width that cannot be halved.
    """
    for name in ("d_model", "head_dim", "d_expert"):
        if getattr(model, name) % 2:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(model, name)}: smaller_model halves it")
    return dataclasses.replace(
        model,
        d_model=model.d_model // 2,
        head_dim=model.head_dim // 2,
        d_expert=model.d_expert // 2,
        d_shared=model.d_shared // 2,
    )
