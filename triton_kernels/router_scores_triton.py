"""router_scores on Triton: one launch forward, one backward. A program holds whole rows of experts, so that nothing is read twice.

Forward takes the best expert k times. Backward computes the scores again from the logits and works on rows of E: with s the scores, m the kept ones
and Z = sum m s, a weight m s / Z has ds = m (dw - sum dw w) / Z; then softmax's or sigmoid's own gradient.

Legend: T tokens, E experts, K slots per token, M tokens of a program.
"""

# Jitted helpers that return tuples, and constants given as Python values, are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.flash_attention_blocks import wide
from triton_kernels.registration import has_work, kernel_op

# Elements of a program's rows of experts.
ELEMENTS = 1024
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def token_logits(logits_ptr, T, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's (token_M, e_E, logit_ME): -inf where there is no expert, zero where there is no token, so that nothing there is NaN."""
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


@triton.jit
def select_kernel(
    logits_ptr, bias_ptr, threshold_ptr, weight_ptr, expert_ptr, keep_ptr, level_ptr, T, E, K, floor,
    RULE: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RULE: 0 top-k, 1 top-p, 2 threshold."""
    token_M, e_E, logit_ME = token_logits(logits_ptr, T, E, BLOCK_M, BLOCK_E)
    k_K, score_ME = tl.arange(0, BLOCK_K), row_scores(logit_ME, SOFTMAX)
    mass_ME = row_scores(logit_ME, True) if RULE == 1 else score_ME
    selection_ME = tl.where((e_E < E)[None, :], score_ME + tl.load(bias_ptr + e_E, mask=e_E < E, other=0.0)[None, :], float("-inf"))
    threshold, mass_M, total_M = tl.load(threshold_ptr), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    weight_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for slot in range(0, K):
        best_M = tl.max(selection_ME, 1)
        expert_M = tl.min(tl.where(selection_ME == best_M[:, None], e_E[None, :], BLOCK_E), 1)
        is_best_ME = e_E[None, :] == expert_M[:, None]
        selection_ME = tl.where(is_best_ME, float("-inf"), selection_ME)
        level_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if slot >= floor and RULE == 1:
            level_M = mass_M
        if slot >= floor and RULE == 2:
            level_M = -best_M
        mass_M += tl.sum(tl.where(is_best_ME, mass_ME, 0.0), 1)
        kept_M = level_M <= threshold
        score_M = tl.where(kept_M, tl.sum(tl.where(is_best_ME, score_ME, 0.0), 1), 0.0)
        total_M += score_M
        weight_MK += tl.where(k_K[None, :] == slot, score_M[:, None], 0.0)
        tl.store(expert_ptr + token_M * K + slot, expert_M.to(tl.int64), mask=token_M < T)
        tl.store(keep_ptr + token_M * K + slot, kept_M, mask=token_M < T)
        tl.store(level_ptr + token_M * K + slot, level_M, mask=token_M < T)
    if RENORMALISE:
        weight_MK /= tl.maximum(total_M, TINY)[:, None]
    tl.store(weight_ptr + token_M[:, None] * K + k_K[None, :], weight_MK, mask=(token_M < T)[:, None] & (k_K < K)[None, :])


@triton.jit
def logit_gradient_kernel(
    logits_ptr, dweight_ptr, expert_ptr, keep_ptr, dlogits_ptr, T, E, K,
    SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token_M, e_E, logit_ME = token_logits(logits_ptr, T, E, BLOCK_M, BLOCK_E)
    score_ME = row_scores(logit_ME, SOFTMAX)
    kept_ME, dscore_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32), tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for slot in range(0, K):
        place_M = token_M * K + slot
        kept_M = tl.load(keep_ptr + place_M, mask=token_M < T, other=0).to(tl.float32)
        is_its_ME = e_E[None, :] == tl.load(expert_ptr + place_M, mask=token_M < T, other=0)[:, None]
        kept_ME += tl.where(is_its_ME, kept_M[:, None], 0.0)
        dscore_ME += tl.where(is_its_ME, (kept_M * tl.load(dweight_ptr + place_M, mask=token_M < T, other=0.0))[:, None], 0.0)
    if RENORMALISE:
        total_M = tl.maximum(tl.sum(kept_ME * score_ME, 1), TINY)
        dscore_ME = kept_ME * (dscore_ME - (tl.sum(dscore_ME * score_ME, 1) / total_M)[:, None]) / total_M[:, None]
    if SOFTMAX:
        dlogit_ME = score_ME * (dscore_ME - tl.sum(dscore_ME * score_ME, 1)[:, None])
    else:
        dlogit_ME = dscore_ME * score_ME * (1 - score_ME)
    tl.store(dlogits_ptr + token_M[:, None] * E + e_E[None, :], dlogit_ME, mask=(token_M < T)[:, None] & (e_E < E)[None, :])


def _launch(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    block_e = max(16, triton.next_power_of_2(logits.shape[1]))
    block_m = max(1, ELEMENTS // block_e)
    return (triton.cdiv(logits.shape[0], block_m),), {"BLOCK_M": block_m, "BLOCK_E": block_e, "num_warps": 4}


@kernel_op("router_scores")
def forward_op(
    logits: Tensor, bias: Tensor, threshold: Tensor, k: int, rule: int, softmax: bool, renormalise: bool, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Slots`."""
    T, E = logits.shape
    weight, expert, keep, level = (logits.new_empty(T, k, dtype=d) for d in (logits.dtype, torch.int64, torch.bool, logits.dtype))
    if has_work(weight):
        grid, options = _launch(logits)
        constants = {"RULE": rule, "SOFTMAX": softmax, "RENORMALISE": renormalise, "BLOCK_K": triton.next_power_of_2(k)}
        inputs = (logits.contiguous(), bias.contiguous(), threshold)
        select_kernel[grid](*inputs, weight, expert, keep, level, T, E, k, floor, **constants, **options)
    return weight, expert, keep, level


@kernel_op("router_scores_backward")
def backward_op(dweight: Tensor, logits: Tensor, expert: Tensor, keep: Tensor, softmax: bool, renormalise: bool) -> Tensor:
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if has_work(dlogits):
        (grid, options), sizes = _launch(logits), (*logits.shape, expert.shape[1])
        inputs = (logits.contiguous(), dweight.contiguous(), expert, keep)
        logit_gradient_kernel[grid](*inputs, dlogits, *sizes, SOFTMAX=softmax, RENORMALISE=renormalise, **options)
    return dlogits


def _save(ctx, inputs, output) -> None:
    logits, _, _, _, _, *ctx.options, _ = inputs
    _, expert, keep, level = output
    ctx.mark_non_differentiable(expert, keep, level)
    ctx.save_for_backward(logits, expert, keep)
    ctx.set_materialize_grads(False)


def _backward(ctx, dweight: Tensor | None, *_: None):
    return None if dweight is None else backward_op(dweight, *ctx.saved_tensors, *ctx.options), *(None,) * 7


forward_op.register_autograd(_backward, setup_context=_save)
