"""How the difficulty study measures, apart from what does it: the command line knows its options without libraries for
figures and statistics."""

import dataclasses

from foundation.numbers import check_numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """How to measure.

    Attributes:
        forced: experts per token forced on all tokens, for the regret and the frontier.
        budgets: mean experts per token at which the methods' own allocations are measured; the models' own k always is.
        windows_per_document: at most so many windows of each document of real text.
        resamples: of documents, for intervals.
        shuffles: of the frequency-matched null.

    Raises:
        ValueError: for numbers that nothing could be measured with, naming the option.
    """

    forced: tuple[int, ...] = (2, 4, 6, 8, 12, 16)
    budgets: tuple[int, ...] = (4, 8, 12, 16)
    windows_per_document: int = 4
    resamples: int = 1000
    shuffles: int = 200

    def __post_init__(self) -> None:
        if len(self.forced) < 2 or list(self.forced) != sorted(set(self.forced)):
            raise ValueError(f"--forced {self.forced}: at least two numbers of experts, ascending")
        check_numbers(self, forced=1, budgets=1, windows_per_document=1, resamples=1, shuffles=1)
