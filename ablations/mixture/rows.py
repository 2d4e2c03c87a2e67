"""The tables of a search for a mixture."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FitRow:
    """How mixtures that were not learnt from are ordered, cross-validated.

    Attributes:
        loss: a domain, or "macro".
        spearman: rank correlation of predicted and measured losses.
        error: root mean square difference, in bits per byte.
    """

    loss: str
    regression: str
    spearman: float
    error: float


@dataclasses.dataclass(frozen=True)
class ShareRow:
    """What a mixture takes of a domain.

    Attributes:
        domain: one of them, or "macro" or "target": all of them, or those that the search aims at, in the mean.
        passes: how often the runs of the model read the domain.
        predicted: bits per byte of a small run on the mixture, by the regression.
    """

    mixture: str
    domain: str
    share: float
    passes: float
    predicted: float
