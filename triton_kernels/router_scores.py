"""From router logits to each token's experts and their weights, in one pass: softmax or sigmoid, top-k, top-p or threshold, renormalisation.

Legend: T tokens, E experts, K slots per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.checks import check_backend, check_tensors

OP = "router_scores"
SCORES = ("softmax", "sigmoid")
RULES = ("top_k", "top_p", "threshold")


class Slots(NamedTuple):
    """weight_TK in the logits' dtype (fp32 at least), differentiable; expert_TK int64, best first; keep_TK bool; level_TK: see `router_scores`."""

    weight_TK: Tensor
    expert_TK: Tensor
    keep_TK: Tensor
    level_TK: Tensor


def router_scores(
    logits_TE: Tensor, bias_E: Tensor, threshold: Tensor, *, k: int, rule: str = "top_k", score: str = "softmax",
    renormalise: bool = True, floor: int = 1, backend: str = "auto",
) -> Slots:  # fmt: skip
    """The k experts of highest score + bias, of which those are kept whose level is at or below the threshold.

    logits_TE   fp32 or fp64; bias_E selects and never weighs; threshold: a scalar tensor, so that a budget's controller needs no host
    rule        a slot's level: "top_k" -inf, "top_p" the softmax mass ahead of it (arXiv 2403.07652), "threshold" minus its score and bias
    floor       the first so many slots have level -inf
    renormalise the kept ones' weights sum to one

    Equal scores: the lower expert first in the Triton kernel; torch.topk promises no order. Raises ValueError for what does not fit.
    """
    E = check_tensors(OP, logits_TE=logits_TE, bias_E=bias_E)["E"]
    if threshold.numel() != 1 or score not in SCORES or rule not in RULES:
        raise ValueError(f"{OP}: threshold {list(threshold.shape)}, rule={rule!r}, score={score!r}; legal: a scalar, {RULES}, {SCORES}")
    if not 0 <= floor <= k <= E:
        raise ValueError(f"{OP}: floor={floor}, k={k}, E={E}; they must not fall, from 0 on")
    if check_backend(backend, logits_TE) == "torch":
        return router_scores_torch(logits_TE, bias_E, threshold, k, rule, score, renormalise, floor)
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.router_scores_triton import forward_op

    if logits_TE.dtype != torch.float32:
        raise ValueError(f"{OP}: logits are {logits_TE.dtype}; the Triton kernels take float32")
    return Slots(*forward_op(logits_TE, bias_E, threshold, k, RULES.index(rule), score == "softmax", renormalise, floor))


def router_scores_torch(logits_TE: Tensor, bias_E: Tensor, threshold: Tensor, k: int, rule: str, score: str, renormalise: bool, floor: int) -> Slots:
    """The same as `routing`'s policies, step by step."""
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    selection_TE = scores_TE.detach() + bias_E
    expert_TK = selection_TE.topk(k, dim=-1)[1]
    level_TK = torch.full(expert_TK.shape, -torch.inf, dtype=logits_TE.dtype, device=logits_TE.device)
    if rule == "top_p":
        mass_TK = logits_TE.detach().softmax(-1).gather(-1, expert_TK)
        level_TK = mass_TK.cumsum(-1) - mass_TK
    elif rule == "threshold":
        level_TK = -selection_TE.gather(-1, expert_TK)
    level_TK[:, :floor] = -torch.inf
    keep_TK = level_TK <= threshold
    weight_TK = scores_TE.gather(-1, expert_TK) * keep_TK
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
    return Slots(weight_TK, expert_TK, keep_TK, level_TK)
