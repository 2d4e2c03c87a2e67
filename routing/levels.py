"""A router's decision with what it was taken on, slot by slot, so that it can be taken again under another budget
without the model: slot j of token t is used if `level_TK[t, j] <= threshold`, see `routing.budget`.

A policy with the same number of experts for every token has no threshold; its levels are the slots' ranks 1, 2, 3, ...
and the threshold is the number.

Legend: T tokens, E experts, K slots per token, M budgets.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from routing.policies.top_k import TopK
from routing.policy import PolicyConfig, Scores
from routing.router import Router

# A policy with one number for all tokens has no cap of its own: as many slots as the variable ones have by default, or
# twice its number.
FIXED_CAP = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Levels:
    """Attributes:
    expert_TK: int64, best first.
    level_TK: fp32 (fp64 for fp64 logits).
    weight_TK: what each slot's expert weighs in the layer's output as it was decided; 0 where it is not used.
    threshold: that of the decision.
    """

    expert_TK: Tensor
    level_TK: Tensor
    weight_TK: Tensor
    threshold: float

    @property
    def keep_TK(self) -> Tensor:
        """The slots used as it was decided, bool."""
        return ~(self.level_TK > self.threshold)


@torch.no_grad()
def levels_of(router: Router, scores: Scores) -> Levels:
    """How the router decides on these scores, with its policy and threshold as they are now. It learns nothing."""
    policy = router.policy
    with contextlib.nullcontext([]) if policy.budget is None else policy.budget.overheard() as heard:
        slots, weight_TK = router.decide(scores)
    expert_TK = slots.expert_TK
    if policy.budget is not None:
        level_TK, threshold = heard[0], float(policy.budget.threshold)
    elif policy.config.varies_by_token:
        # Without a budget there is nothing to move: what was used stays used.
        keep_TK = torch.ones_like(expert_TK, dtype=torch.bool) if slots.keep_TK is None else slots.keep_TK
        level_TK, threshold = torch.where(keep_TK, -torch.inf, torch.inf), 0.0
    else:
        ranked = _ranked(router)
        module = ranked.build(n_experts=router.n_experts, d_model=router.d_model, layer_index=router.layer_index)
        threshold, expert_TK = float(expert_TK.shape[1]), module.select(scores).expert_TK
        level_TK = torch.arange(1.0, expert_TK.shape[1] + 1, device=expert_TK.device).expand(len(expert_TK), -1)
    weight_TE = torch.zeros_like(scores.scores_TE).scatter(1, slots.expert_TK, weight_TK.to(scores.scores_TE.dtype))
    return Levels(
        expert_TK=expert_TK,
        level_TK=level_TK,
        weight_TK=weight_TE.gather(1, expert_TK) * router.config.scaling,
        threshold=threshold,
    )


def most_experts(router: Router) -> int:
    """The most experts that any token can get from the router: where a fixed scale ends."""
    columns = router.n_experts + router.policy.config.null_columns
    x_TD, logits = (router.weight_ED.new_zeros(1, width) for width in (router.d_model, columns))
    return levels_of(router, router.scores_of(x_TD, logits)).expert_TK.shape[1]


def _ranked(router: Router) -> PolicyConfig:
    """The policy with every slot that a budget may ask for, of a router with one number for all tokens."""
    config = router.policy.config
    reach = router.n_experts
    if isinstance(config, TopK):
        reach = reach // config.n_groups * config.top_groups
    k = min(reach, max(FIXED_CAP, 2 * math.ceil(config.assumed_experts)))
    return config.of_number(k) or TopK(k=k)


def thresholds_of(router: Router, level_TK: Tensor, means: Sequence[float]) -> Tensor:
    """The threshold for each mean number of experts, fp32 [M]: what calibration on these very levels would set
    (`routing.budget.exact_threshold`), for all means from one sort.

    Args:
        level_TK: of a router with a threshold, over text to calibrate on; for the others the thresholds are the means.
        means: experts per token.

    Returns:
        NaN for a mean out of reach: above the slots, below what the policy always uses, no whole number where every
        token gets the same number, or any where there is no budget.
    """
    budget = router.policy.budget
    if budget is None:
        most = 0 if router.policy.config.varies_by_token else _ranked(router).fixed_experts or 0
        return torch.tensor([m if m == int(m) and 1 <= m <= most else math.nan for m in means])
    n_tokens, n_slots = level_TK.shape
    sorted_N = level_TK.detach().float().flatten().sort()[0].cpu()
    forced = int(torch.isneginf(sorted_N).sum())
    found = []
    for mean in means:
        wanted = round(mean * n_tokens)
        if mean > n_slots or forced > mean * n_tokens + 1e-6 * n_tokens:
            found.append(math.nan)
        else:
            threshold = sorted_N[wanted - 1] if wanted else sorted_N.new_full((), -torch.inf)
            found.append(float(threshold.clamp(budget.lowest, budget.highest)))
    return torch.tensor(found)
