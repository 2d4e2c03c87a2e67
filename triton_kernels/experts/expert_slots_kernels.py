"""Kernels of router_scores and sort_slots, without atomics and without the host.

router_scores is one launch forward and one backward, in which a program holds whole rows of experts, so that nothing is
read twice. Forward takes the best expert k times. Backward computes the scores again from the logits: with s the
scores, m the kept ones and Z = sum m s, a weight m s / Z has ds = m (dw - sum dw w) / Z; then softmax's or sigmoid's
own gradient.

sort_slots is one pass of a counting sort. Each block of slots counts its slots per bucket: the experts, and one more
bucket for dropped slots. An exclusive prefix sum over (bucket, block) turns the counts into the row at which each
block's share of each bucket starts. There each block places its slots; equal ones keep their order, which their rank
among the block's slots gives. How many slots were dropped before slot i follows from the last bucket's row starts, and
with it the place of i among the kept ones. Backward is one gather.

Legend: T tokens, E experts, K slots per token, M tokens of a program, N slots or rows, B blocks of slots, P slots of a
block.
"""

# Jitted helpers that return tuples are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
from collections import namedtuple

import torch
import triton
import triton.language as tl

from triton_kernels.common.tiles import wide

TINY, LEAST = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def token_logits(logits_ptr, T, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's (token_M, e_E, logit_ME): -inf where there is no expert, zero where there is no token, so that
    nothing there is NaN."""
    token_M, e_E = wide(tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    exists_ME = (token_M < T)[:, None] & (e_E < E)[None, :]
    logit_ME = tl.load(logits_ptr + token_M[:, None] * E + e_E[None, :], mask=exists_ME, other=float("-inf"))
    return token_M, e_E, tl.where((token_M < T)[:, None], logit_ME, 0.0)


@triton.jit
def row_scores(logit_ME, SOFTMAX: tl.constexpr):
    """Logits are -inf where there is no expert: their score is zero."""
    if SOFTMAX:
        e_ME = tl.exp(logit_ME - tl.max(logit_ME, 1)[:, None])
        return e_ME / tl.sum(e_ME, 1)[:, None]
    else:
        return tl.sigmoid(logit_ME)


# A router's tensors, the slots it fills, and the constants of both passes.
RouterTensors = namedtuple("RouterTensors", "logits bias threshold")
SlotTensors = namedtuple("SlotTensors", "weight expert keep level")
ScoreForm = namedtuple("ScoreForm", "SOFTMAX RENORMALISE BLOCK_M BLOCK_E")
LogitTensors = namedtuple("LogitTensors", "logits dweight expert keep dlogits")


@triton.jit
def select_kernel(router, slots, T, E, K, floor, RULE: tl.constexpr, FORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """The slots of BLOCK_M tokens, the best expert first; the first `floor` of them are kept whatever the threshold."""
    SOFTMAX: tl.constexpr = FORM.SOFTMAX
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_E: tl.constexpr = FORM.BLOCK_E
    logits_ptr, bias_ptr, threshold_ptr = router
    weight_ptr, expert_ptr, keep_ptr, level_ptr = slots
    token_M, e_E, logit_ME = token_logits(logits_ptr, T, E, BLOCK_M, BLOCK_E)
    k_K, score_ME = tl.arange(0, BLOCK_K), row_scores(logit_ME, SOFTMAX)
    mass_ME = row_scores(logit_ME, True) if RULE == "top_p" else score_ME
    selection_ME = score_ME + tl.load(bias_ptr + e_E, mask=e_E < E, other=0.0)[None, :]
    # A NaN goes first, as in torch, and weighs NaN, whether it comes from the logits or from the bias. No expert that
    # exists is at -inf, where those are that do not, or were taken.
    is_nan_ME = selection_ME != selection_ME
    score_ME = tl.where(is_nan_ME, float("nan"), score_ME)
    selection_ME = tl.where(is_nan_ME, float("inf"), tl.maximum(selection_ME, LEAST))
    selection_ME = tl.where((e_E < E)[None, :], selection_ME, float("-inf"))
    threshold, mass_M, total_M = (
        tl.load(threshold_ptr),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    weight_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for slot in range(0, K):
        best_M = tl.max(selection_ME, 1)
        expert_M = tl.min(tl.where(selection_ME == best_M[:, None], e_E[None, :], BLOCK_E), 1)
        is_best_ME = e_E[None, :] == expert_M[:, None]
        selection_ME = tl.where(is_best_ME, float("-inf"), selection_ME)
        level_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if slot >= floor and RULE == "top_p":
            level_M = mass_M
        if slot >= floor and RULE == "threshold":
            level_M = -best_M
        mass_M += tl.sum(tl.where(is_best_ME, mass_ME, 0.0), 1)
        # What cannot be compared is kept: dropped, a NaN would become a zero.
        kept_M = (level_M > threshold) == 0
        score_M = tl.where(kept_M, tl.sum(tl.where(is_best_ME, score_ME, 0.0), 1), 0.0)
        score_M = tl.where(threshold == threshold, score_M, float("nan"))
        total_M += score_M
        weight_MK += tl.where(k_K[None, :] == slot, score_M[:, None], 0.0)
        tl.store(expert_ptr + token_M * K + slot, expert_M.to(tl.int64), mask=token_M < T)
        tl.store(keep_ptr + token_M * K + slot, kept_M, mask=token_M < T)
        tl.store(level_ptr + token_M * K + slot, level_M, mask=token_M < T)
    if FORM.RENORMALISE:
        weight_MK /= tl.where(total_M < TINY, TINY, total_M)[:, None]
    tl.store(
        weight_ptr + token_M[:, None] * K + k_K[None, :], weight_MK, mask=(token_M < T)[:, None] & (k_K < K)[None, :]
    )


@triton.jit
def logit_gradient_kernel(tensors, T, E, K, FORM: tl.constexpr):
    """dlogits of BLOCK_M tokens, from the gradient of their slots' weights."""
    SOFTMAX: tl.constexpr = FORM.SOFTMAX
    BLOCK_M: tl.constexpr = FORM.BLOCK_M
    BLOCK_E: tl.constexpr = FORM.BLOCK_E
    logits_ptr, dweight_ptr, expert_ptr, keep_ptr, dlogits_ptr = tensors
    token_M, e_E, logit_ME = token_logits(logits_ptr, T, E, BLOCK_M, BLOCK_E)
    score_ME = row_scores(logit_ME, SOFTMAX)
    kept_ME, dscore_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32), tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for slot in range(0, K):
        place_M = token_M * K + slot
        kept_M = tl.load(keep_ptr + place_M, mask=token_M < T, other=0).to(tl.float32)
        is_its_ME = e_E[None, :] == tl.load(expert_ptr + place_M, mask=token_M < T, other=0)[:, None]
        kept_ME += tl.where(is_its_ME, kept_M[:, None], 0.0)
        dscore_ME += tl.where(
            is_its_ME, (kept_M * tl.load(dweight_ptr + place_M, mask=token_M < T, other=0.0))[:, None], 0.0
        )
    if FORM.RENORMALISE:
        total_M = tl.sum(kept_ME * score_ME, 1)
        total_M = tl.where(total_M < TINY, TINY, total_M)
        dscore_ME = kept_ME * (dscore_ME - (tl.sum(dscore_ME * score_ME, 1) / total_M)[:, None]) / total_M[:, None]
    if SOFTMAX:
        dlogit_ME = score_ME * (dscore_ME - tl.sum(dscore_ME * score_ME, 1)[:, None])
    else:
        dlogit_ME = dscore_ME * score_ME * (1 - score_ME)
    tl.store(
        dlogits_ptr + token_M[:, None] * E + e_E[None, :], dlogit_ME, mask=(token_M < T)[:, None] & (e_E < E)[None, :]
    )


@triton.jit
def slot_buckets(expert_ptr, keep_ptr, N, E, BLOCK_P: tl.constexpr):
    """This program's slots, and the bucket of each: its expert, E if dropped, E + 1 if there is no such slot."""
    slot_P = wide(tl.program_id(0)) * BLOCK_P + tl.arange(0, BLOCK_P)
    bucket_P = tl.load(expert_ptr + slot_P, mask=slot_P < N, other=0).to(tl.int32)
    if keep_ptr is not None:
        bucket_P = tl.where(tl.load(keep_ptr + slot_P, mask=slot_P < N, other=0).to(tl.int1), bucket_P, E)
    return slot_P, tl.where(slot_P < N, bucket_P, E + 1)


@triton.jit
def count_kernel(expert_ptr, keep_ptr, count_ptr, N, E, n_blocks, BUCKETS: tl.constexpr, BLOCK_P: tl.constexpr):
    """count [E + 1, B]."""
    _, bucket_P = slot_buckets(expert_ptr, keep_ptr, N, E, BLOCK_P)
    e_E, count_E = tl.arange(0, BUCKETS), tl.histogram(bucket_P, BUCKETS)
    tl.store(count_ptr + wide(e_E) * n_blocks + tl.program_id(0), count_E, mask=e_E <= E)


@triton.jit
def scan_kernel(count_ptr, start_ptr, expert_offsets_ptr, n_blocks, SCAN: tl.constexpr):
    """start [E + 1, B], the exclusive prefix sum of count in that order, and expert_offsets [E + 1], its first column.
    A program per bucket."""
    bucket = wide(tl.program_id(0))
    sum_P = tl.zeros([SCAN], tl.int64)
    for first in range(0, bucket * n_blocks, SCAN):
        i_P = first + tl.arange(0, SCAN)
        sum_P += tl.load(count_ptr + i_P, mask=i_P < bucket * n_blocks, other=0)
    before = tl.sum(sum_P)
    tl.store(expert_offsets_ptr + bucket, before)
    for first in range(0, n_blocks, SCAN):
        block_P = first + tl.arange(0, SCAN)
        count_P = tl.load(count_ptr + bucket * n_blocks + block_P, mask=block_P < n_blocks, other=0).to(tl.int64)
        tl.store(
            start_ptr + bucket * n_blocks + block_P, before + tl.cumsum(count_P) - count_P, mask=block_P < n_blocks
        )
        before += tl.sum(count_P)


# What has an entry per row, per token and per slot.
RowTensors = namedtuple("RowTensors", "weight token expert token_offsets row_of_slot row")


@triton.jit
def place_kernel(
    expert_ptr,
    keep_ptr,
    weight_ptr,
    start_ptr,
    expert_offsets_ptr,
    rows,
    N,
    K,
    E,
    n_blocks,
    BLOCK_P: tl.constexpr,
):
    """Everything that has an entry per slot; row [N] is the row of each slot, -1 for dropped ones."""
    slot_P, bucket_P = slot_buckets(expert_ptr, keep_ptr, N, E, BLOCK_P)
    weight_N_ptr, token_N_ptr, expert_N_ptr, token_offsets_ptr, row_of_slot_ptr, row_ptr = rows
    exists_P = slot_P < N
    earlier_PP = tl.arange(0, BLOCK_P)[:, None] > tl.arange(0, BLOCK_P)[None, :]
    rank_P = tl.sum((earlier_PP & (bucket_P[:, None] == bucket_P[None, :])).to(tl.int32), 1)
    row_P = tl.load(start_ptr + wide(bucket_P) * n_blocks + tl.program_id(0), mask=exists_P, other=0) + rank_P
    token_P = slot_P // K
    weight_P = tl.load(weight_ptr + slot_P, mask=exists_P, other=0.0)
    tl.store(weight_N_ptr + row_P, tl.where(bucket_P < E, weight_P, 0.0), mask=exists_P)
    tl.store(token_N_ptr + row_P, token_P, mask=exists_P)
    tl.store(expert_N_ptr + row_P, wide(bucket_P), mask=exists_P)
    tl.store(row_ptr + slot_P, tl.where(bucket_P < E, row_P, -1), mask=exists_P)
    n_kept = tl.load(expert_offsets_ptr + E)
    dropped_P = (
        tl.load(start_ptr + wide(E) * n_blocks + tl.program_id(0))
        - n_kept
        + tl.sum((earlier_PP & (bucket_P == E)[None, :]).to(tl.int32), 1)
    )
    place_P = tl.where(bucket_P < E, slot_P - dropped_P, n_kept + dropped_P)
    tl.store(row_of_slot_ptr + place_P, row_P, mask=exists_P)
    tl.store(token_offsets_ptr + token_P, slot_P - dropped_P, mask=exists_P & (slot_P % K == 0))
    if tl.program_id(0) == 0:
        tl.store(token_offsets_ptr + N // K, n_kept)


@triton.jit
def slot_gradient_kernel(dweight_N_ptr, row_ptr, dweight_ptr, N, BLOCK: tl.constexpr):
    """Each kept slot's weight gradient from its row, zero for dropped slots."""
    slot_P = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    row_P = tl.load(row_ptr + slot_P, mask=slot_P < N, other=-1)
    tl.store(dweight_ptr + slot_P, tl.load(dweight_N_ptr + row_P, mask=row_P >= 0, other=0.0), mask=slot_P < N)
