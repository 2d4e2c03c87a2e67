"""When a gate has its answer: few seeds first, more until the interval leaves the margin, at an error rate that neither
many looks nor many tries raise.

A gate may be wrong with probability `error` over all that it is ever asked on one trunk. Try number i gets the share
1 / (i (i + 1)) of it, and these shares add up to one however many tries follow (alpha-spending for tests that arrive
one by one, Foster and Stine, "alpha-investing: a procedure for sequential control of expected false discoveries",
Journal of the Royal Statistical Society B 70, 2008; dividing by i alone would grow beyond every bound). Each of a try's
looks gets an equal part (Bonferroni, after Dunn, "Multiple comparisons among means", Journal of the American
Statistical Association 56, 1961; why looks must pay at all: Armitage, McPherson and Rowe, "Repeated significance tests
on accumulating data", Journal of the Royal Statistical Society A 132, 1969). Boundaries that know how looks hang
together, O'Brien and Fleming's, ask for less at the last one, but for many degrees of freedom and independent
increments; here two or three seeds stand behind a variance, and all looks read the same text. Adding up errors needs
neither.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from ablations.comparison.statistics import Difference
from ablations.comparison.verdicts import withheld
from foundation.numbers import check_numbers

Answer = Literal["keep", "discard", "unresolved"]
# Seeds at each look; every step adds about as much again as the one before it did.
LOOKS = (3, 5, 8, 13, 21, 34, 55)
FEWEST = 2
ERROR = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What is asked of a method.

    Attributes:
        margin: bits per byte by which the method has to be better than the baseline; a negative one accepts its being
            worse by less than so much.
        error: probability of any wrong verdict among all tries on one trunk.

    Raises:
        ValueError: for a margin that is no finite number and an error outside (0, 1), naming the field.
    """

    margin: float = 0.0
    error: float = ERROR

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.error < 1:
            raise ValueError(f"GateConfig.error: {self.error}, must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """The comparison of one number of seeds, and what it answers.

    Attributes:
        seeds: branches of method and baseline on each trunk.
        effect: the method's bits per byte minus the baseline's, so negative is better.
        low, high: its interval.
        level: confidence of the interval: one minus this look's share of the error.
        detectable: the smallest true distance from the margin that such a look answers in 80 % of cases, in bits per
            byte.
        fork_shock: see `ablations.comparison.verdicts.Outcome`.
        withheld: whether it alone keeps a clear difference from being an answer.
        words: why it is unresolved, or what was found, for the reader.
    """

    seeds: int
    effect: float
    low: float
    high: float
    level: float
    detectable: float
    fork_shock: float | None
    withheld: bool
    answer: Answer
    words: str


def looks_of(seeds: int) -> tuple[int, ...]:
    """The seeds at each look of a gate that may train so many.

    Raises:
        ValueError: for fewer than two: one has no spread.
    """
    if seeds < FEWEST:
        raise ValueError(f"--seeds {seeds}: a gate needs at least {FEWEST}, one seed has no spread")
    return (*(n for n in LOOKS if n < seeds), seeds)


def error_of_look(error: float, *, n_looks: int, number: int) -> float:
    """The probability with which one look may answer wrongly.

    Args:
        error: of all tries together.
        n_looks: that this try may take.
        number: of this try among those on its trunk, from 1.
    """
    return error / (number * (number + 1)) / n_looks


def judge(difference: Difference, shock: float | None, *, seeds: int, margin: float, error: float) -> Look:
    """What one look answers.

    Args:
        difference: the method's minus the baseline's.
        shock: of its fork; None where there is none to blame.
        error: of this look, see `error_of_look`.
    """
    half = difference.half_width(error)
    low, high = difference.mean - half, difference.mean + half
    answer: Answer = "keep" if high < -margin else "discard" if low > -margin else "unresolved"
    words = f"the interval holds {0 - margin:g}" if answer == "unresolved" else found(answer, margin)
    why = withheld(difference.mean + margin, shock) if answer != "unresolved" else None
    if why is not None:
        answer, words = "unresolved", why
    return Look(
        seeds=seeds,
        effect=difference.mean,
        low=low,
        high=high,
        level=1 - error,
        detectable=difference.detectable(error),
        fork_shock=shock,
        withheld=why is not None,
        answer=answer,
        words=words,
    )


def found(answer: Answer, margin: float) -> str:
    """A clear answer in words."""
    if margin < 0:
        amount = f"less than {-margin:g}, or better" if answer == "keep" else f"more than {-margin:g}"
        return f"worse than the baseline by {amount}"
    better = "better than the baseline" + f" by more than {margin:g}" * (margin > 0)
    return better if answer == "keep" else f"not {better}"


def decide(looks: tuple[int, ...], look: Callable[[int], Look]) -> list[Look]:
    """Looks until one has its answer or none is left.

    Args:
        looks: numbers of seeds, ascending.
        look: trains what such a comparison still lacks, and judges it.

    Returns:
        The looks that were taken; the last one's answer is the gate's.
    """
    taken: list[Look] = []
    for seeds in looks:
        taken.append(look(seeds))
        # More seeds do not make the shock of a fork smaller.
        if taken[-1].answer != "unresolved" or taken[-1].withheld:
            break
    return taken
