"""Budgets of texts that are generated side by side: every text has a mean number of experts of its own, which may
change between two of its tokens.

    budgets = TextBudgets(model, calibration_BT)
    budgets.set(0, 4)
    for step in generate_batch(model, prompts, budgets=budgets, ...):
        budgets.set(1, 2)

The texts share every forward pass. In it each token has the threshold (of a policy with a budget) or the number of
experts (of one with the same number for all) of its text.

Legend: B texts, T tokens.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lm.budget import set_budget
from lm.model import LanguageModel
from routing.policies.top_k import TopK
from routing.policy import Policy
from routing.router import Router


@dataclasses.dataclass(frozen=True)
class BudgetChange:
    """Another mean number of experts per token from a generated token on, counted from 0; None: as trained."""

    token: int
    mean: float | None


def parse_changes(texts: Sequence[str]) -> tuple[BudgetChange, ...]:
    """The changes meant by "40:2" (token and mean) and "80:trained", in the order of their tokens.

    Raises:
        ValueError: for any other text, or two changes at one token.
    """
    changes = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,9}):(\d+(?:\.\d+)?|trained)", text)
        mean = float(match[2]) if match and match[2] != "trained" else None
        if match is None or mean == 0:
            raise ValueError(
                f"experts_at: {text!r}; legal: a token, counted from 0, and a mean number of experts above 0 or"
                " 'trained', such as 40:2"
            )
        changes.append(BudgetChange(int(match[1]), mean))
    tokens = [change.token for change in changes]
    if twice := [token for token in tokens if tokens.count(token) > 1]:
        raise ValueError(f"experts_at: {tokens.count(twice[0])} changes at token {twice[0]}; legal: one")
    return tuple(sorted(changes, key=lambda change: change.token))


class TextBudgets:
    """The mean number of experts per token of each text, by its place among the prompts.

    Args:
        model: whose policies and thresholds are what "as trained" means.
        inputs_BT: text to set thresholds on; may be None where no policy has one.
    """

    def __init__(self, model: LanguageModel, inputs_BT: Tensor | None) -> None:
        self.model, self.inputs_BT = model, inputs_BT
        self._means: dict[int, float | None] = {}
        # What each layer holds a mean by, see `_limit`; setting one again costs nothing.
        self._limits: dict[float | None, list[float]] = {None: self._read()}
        self._fixed: dict[tuple[int, int], Policy] = {}

    def set(self, text: int, mean: float | None) -> None:
        """From its next token on the text uses `mean` experts per token on average in every layer; None: as trained.

        Raises:
            ValueError: for a mean that the model cannot hold, or a model whose thresholds there is no text to set on;
                nothing has changed then.
        """
        if mean is not None and mean not in self._limits:
            self._limits[mean] = self._calibrated(mean)
        self._means[text] = mean

    def change(self, text: int, changes: Sequence[BudgetChange], token: int) -> None:
        """Makes the change that is due before this token of the text, if there is one; errors as of `set`."""
        for change in changes:
            if change.token == token:
                self.set(text, change.mean)

    @contextlib.contextmanager
    def using(self, texts: Sequence[int]) -> Iterator[None]:
        """Inside, the model's next forward passes are of these texts: one token of each, or any number of tokens of a
        single one."""
        means = [self._means.get(text) for text in texts]
        routers = self.model.routers()
        before = [(router.policy, _threshold(router.policy)) for router in routers]
        try:
            for layer, router in enumerate(routers):
                self._apply(layer, router, [self._limits[mean][layer] for mean in means])
            yield
        finally:
            for router, (policy, threshold) in zip(routers, before):
                router.policy.counts_T = None
                router.policy = policy
                if policy.budget is not None and threshold is not None:
                    policy.budget.threshold_T1 = None
                    policy.budget.threshold.copy_(threshold)

    def _apply(self, layer: int, router: Router, limits: Sequence[float]) -> None:
        alike, device = len(set(limits)) == 1, router.weight_ED.device
        if (budget := router.policy.budget) is not None:
            # As one number it is what every kernel knows.
            if alike:
                budget.threshold.fill_(limits[0])
            else:
                budget.threshold_T1 = torch.tensor(limits, dtype=budget.threshold.dtype, device=device)[:, None]
        elif any(limit != limits[0] or limit != _limit(router) for limit in limits):
            router.policy = self._of_number(layer, router, int(max(limits)))
            if not alike:
                router.policy.counts_T = torch.tensor(limits, dtype=torch.int64, device=device)

    def _of_number(self, layer: int, router: Router, k: int) -> Policy:
        """Top-k of a layer; the same object each time, so that what is prepared for a decode step stays prepared."""
        if (layer, k) not in self._fixed:
            module = router.module_of(router.policy.config.of_number(k) or TopK(k=k)).to(router.weight_ED.device)
            self._fixed[layer, k] = module.train(router.training)
        return self._fixed[layer, k]

    def _calibrated(self, mean: float) -> list[float]:
        routers = self.model.routers()
        if self.inputs_BT is None and any(router.policy.budget is not None for router in routers):
            raise ValueError(
                f"{mean:g} experts per token: there is no text to set thresholds on; legal: None, as trained"
            )
        before = [(router.policy, _threshold(router.policy)) for router in routers]
        try:
            # Without thresholds no text is read.
            set_budget(self.model, mean, torch.zeros(1, 1) if self.inputs_BT is None else self.inputs_BT)
            return self._read()
        finally:
            for router, (policy, threshold) in zip(routers, before):
                router.policy = policy
                if policy.budget is not None and threshold is not None:
                    policy.budget.threshold.copy_(threshold)

    def _read(self) -> list[float]:
        return [_limit(router) for router in self.model.routers()]


def _threshold(policy: Policy) -> Tensor | None:
    return None if policy.budget is None else policy.budget.threshold.clone()


def _limit(router: Router) -> float:
    """What a layer holds its mean by: a threshold, or the number of experts of every token.

    Raises:
        ValueError: for a policy that has neither.
    """
    if router.policy.budget is not None:
        return float(router.policy.budget.threshold)
    number = router.policy.asked_experts
    if number is None or number != int(number):
        raise ValueError(
            f"{type(router.policy).__name__} of layer {router.layer_index}: it has neither a threshold nor one number"
            " for all tokens, so that texts cannot have budgets of their own"
        )
    return float(number)
