"""From a router's logits to the rows that experts compute: `router_scores` fills each token's slots, `sort_slots` sorts
them by expert.

Legend: T tokens, E experts, K slots per token, N = T * K slots, and rows once they are sorted.
"""

from collections import namedtuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from triton_kernels.common.checks import check_backend, check_placed, check_range, check_tensors
from triton_kernels.experts.native import router_scores_native, routes_natively, sort_slots_native

SCORES, RULES = ("softmax", "sigmoid"), ("top_k", "top_p", "threshold")

# weight_TK in the logits' dtype (fp32 at least), differentiable; expert_TK int64, best first; keep_TK bool; level_TK:
# see `router_scores`.
Slots = namedtuple("Slots", "weight_TK expert_TK keep_TK level_TK")
# The fields of `routing.assignments.Assignments`, which says what they hold; weight_N carries the gradient of the
# slots' weights.
Rows = namedtuple("Rows", "weight_N token_N expert_N expert_offsets token_offsets row_of_slot_N")


def router_scores(
    logits_TE: Tensor,
    bias_E: Tensor,
    threshold: Tensor,
    *,
    k: int,
    rule: str = "top_k",
    score: str = "softmax",
    renormalise: bool = True,
    floor: int = 1,
    backend: str = "auto",
) -> Slots:
    """The k experts of highest score + bias, of which those are kept whose level is at or below the threshold.

    Args:
        logits_TE: fp32 or fp64.
        bias_E: selects and never weighs.
        threshold: a scalar tensor, so that a budget's controller needs no host.
        rule: a slot's level: "top_k" -inf, "top_p" the softmax mass ahead of it (arXiv 2403.07652), "threshold" minus
            its score and bias.
        score: "softmax" or "sigmoid" of the logits.
        renormalise: the kept ones' weights sum to one.
        floor: the first so many slots have level -inf.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        The slots. Equal scores: the lower expert first in the Triton kernel; torch.topk promises no order.

    Raises:
        ValueError: for what does not fit.
    """
    E = check_tensors("router_scores", logits_TE=logits_TE, bias_E=bias_E)["E"]
    check_placed("router_scores", logits_TE=logits_TE, bias_E=bias_E, threshold=threshold)
    if threshold.numel() != 1 or score not in SCORES or rule not in RULES:
        raise ValueError(
            f"router_scores: threshold {list(threshold.shape)}, rule={rule!r}, score={score!r}; legal: a scalar,"
            f" {RULES}, {SCORES}"
        )
    if not 0 <= floor <= k <= E:
        raise ValueError(f"router_scores: floor={floor}, k={k}, E={E}; they must not fall, from 0 on")
    backend = check_backend(backend, logits_TE, native=routes_natively(logits_TE, len(logits_TE), bias_E))
    if backend == "native":
        return Slots(
            *router_scores_native(
                logits_TE,
                bias_E,
                threshold,
                k=k,
                rule=RULES.index(rule),
                score=score,
                renormalise=renormalise,
                floor=floor,
            )
        )
    if backend == "torch":
        return router_scores_torch(
            logits_TE, bias_E, threshold, k=k, rule=rule, score=score, renormalise=renormalise, floor=floor
        )
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.experts.expert_slots_launch import scores_op

    if logits_TE.dtype != torch.float32:
        raise ValueError(f"router_scores: logits are {logits_TE.dtype}; the Triton kernels take float32")
    return Slots(
        *scores_op(
            logits=logits_TE,
            bias=bias_E,
            threshold=threshold,
            k=k,
            rule=rule,
            score=score,
            renormalise=renormalise,
            floor=floor,
        )
    )


def router_scores_torch(
    logits_TE: Tensor,
    bias_E: Tensor,
    threshold: Tensor,
    *,
    k: int,
    rule: str,
    score: str,
    renormalise: bool,
    floor: int,
) -> Slots:
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
    # What cannot be compared is kept: dropped, a NaN would become a zero. An expert that a NaN in its bias selects
    # weighs NaN, and so do all where the threshold is one.
    keep_TK = ~(level_TK > threshold)
    is_nan_TK = selection_TE.gather(-1, expert_TK).isnan() | threshold.isnan()
    weight_TK = (scores_TE.gather(-1, expert_TK) * keep_TK).masked_fill(is_nan_TK, torch.nan)
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weight_TK.dtype).tiny)
    return Slots(weight_TK, expert_TK, keep_TK, level_TK)


def sort_slots(
    expert_TK: Tensor,
    weight_TK: Tensor,
    keep_TK: Tensor | None,
    *,
    n_experts: int,
    padded: bool | None = None,
    backend: str = "auto",
) -> Rows:
    """A stable sort by expert of the kept slots.

    Args:
        expert_TK: integers in [0, n_experts); what a dropped slot holds does not matter.
        weight_TK: floating point.
        keep_TK: bool, or None to keep every slot.
        padded: leave dropped slots as rows of weight zero behind the last expert: the default but on the CPU, where
            counting the kept ones makes nobody wait, and the only way of the Triton kernels.
        backend: "torch", "triton", or "auto": Triton on CUDA tensors.

    Returns:
        The rows; gradients flow from weight_N to weight_TK.

    Raises:
        ValueError: for shapes that differ, and for padded = False with the Triton kernels.
    """
    check_tensors("sort_slots", expert_TK=expert_TK, weight_TK=weight_TK, keep_TK=keep_TK)
    check_placed("sort_slots", expert_TK=expert_TK, weight_TK=weight_TK, keep_TK=keep_TK)
    check_range("sort_slots", "expert_TK", expert_TK, 0, n_experts - 1, keep_TK)
    native = padded is not True and expert_TK.dtype == torch.int64 and routes_natively(weight_TK, len(weight_TK))
    backend = check_backend(backend, expert_TK, native=native)
    if backend == "native":
        return Rows(*sort_slots_native(expert_TK, weight_TK, keep_TK, n_experts=n_experts))
    # Slots can be taken out only by waiting for their number.
    if backend == "torch" or (backend == "auto" and padded is False):
        return sort_slots_torch(
            expert_TK,
            weight_TK,
            keep_TK,
            n_experts=n_experts,
            padded=expert_TK.device.type != "cpu" if padded is None else padded,
        )
    if padded is False:
        raise ValueError(
            "sort_slots: padded = False; the Triton kernels cannot know how many slots are kept, and leave the others"
            " as padding"
        )
    from triton_kernels.experts.expert_slots_launch import sort_op

    return Rows(*sort_op(weight=weight_TK, expert=expert_TK, keep=keep_TK, n_experts=n_experts)[:-1])


def sort_slots_torch(
    expert_TK: Tensor, weight_TK: Tensor, keep_TK: Tensor | None, n_experts: int, padded: bool
) -> Rows:
    n_tokens, n_slots = expert_TK.shape
    # Dropped slots sort behind every expert. A stable sort of slots that lie in token order leaves each expert's rows
    # in token order. int16 because torch's radix sort on the CPU is several times faster on narrow integers.
    bucket_TK = expert_TK if keep_TK is None else expert_TK.masked_fill(~keep_TK, n_experts)
    bucket_N = bucket_TK.reshape(-1).to(torch.int16 if n_experts < 2**15 else torch.int32)
    expert_N, slot_of_row_N = torch.sort(bucket_N, stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N)
    row_of_slot_N[slot_of_row_N] = torch.arange(n_tokens * n_slots, device=slot_of_row_N.device)
    expert_offsets = torch.searchsorted(
        expert_N, torch.arange(n_experts + 1, device=expert_N.device, dtype=expert_N.dtype)
    )
    token_offsets = torch.arange(n_tokens + 1, device=expert_TK.device) * n_slots
    if keep_TK is not None:
        token_offsets = pad(keep_TK.sum(dim=1).cumsum(dim=0), (1, 0))
        if padded:
            # Kept slots first, each group in its old order: a compaction whose size the host need not know.
            row_of_slot_N = row_of_slot_N[torch.sort((~keep_TK).reshape(-1).to(torch.uint8), stable=True)[1]]
            weight_TK = weight_TK.masked_fill(~keep_TK, 0.0)
        else:
            row_of_slot_N = row_of_slot_N[keep_TK.reshape(-1)]
            expert_N, slot_of_row_N = expert_N[: len(row_of_slot_N)], slot_of_row_N[: len(row_of_slot_N)]
    weight_N = weight_TK.reshape(-1).index_select(0, slot_of_row_N)
    return Rows(
        weight_N,
        slot_of_row_N // max(n_slots, 1),
        expert_N.to(torch.int64),
        expert_offsets,
        token_offsets,
        row_of_slot_N,
    )
