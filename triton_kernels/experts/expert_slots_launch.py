"""router_scores and sort_slots on their Triton kernels, see `expert_slots_kernels.py`.

Legend: T tokens, E experts, K slots per token, N slots or rows, B blocks of slots, P slots of a block.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, padded, power_of_two
from triton_kernels.experts.expert_slots_kernels import (
    LogitTensors,
    RouterTensors,
    RowTensors,
    ScoreForm,
    SlotTensors,
    count_kernel,
    logit_gradient_kernel,
    place_kernel,
    scan_kernel,
    select_kernel,
    slot_gradient_kernel,
)

# Elements of a program's rows of experts; slots of a block; blocks of a step of the prefix sum.
ELEMENTS, BLOCK_P, SCAN = 1024, 128, 512


@kernel_op("router_scores")
def scores_op(
    logits: Tensor, bias: Tensor, threshold: Tensor, k: int, rule: str, score: str, renormalise: bool, floor: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Slots`."""
    (T, E), dtypes = logits.shape, (logits.dtype, torch.int64, torch.bool, logits.dtype)
    weight, expert, keep, level = (logits.new_empty(T, k, dtype=dtype) for dtype in dtypes)
    if has_work(weight):
        grid, form = _scores_launch(logits, score, renormalise)
        select_kernel[grid](
            router=RouterTensors(logits=logits, bias=bias, threshold=threshold),
            slots=SlotTensors(weight=weight, expert=expert, keep=keep, level=level),
            T=T,
            E=E,
            K=k,
            floor=floor,
            RULE=rule,
            FORM=form,
            BLOCK_K=power_of_two(k),
            num_warps=4,
        )
    return weight, expert, keep, level


@kernel_op("router_scores_backward")
def scores_backward_op(
    dweight: Tensor, logits: Tensor, expert: Tensor, keep: Tensor, score: str, renormalise: bool
) -> Tensor:
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if has_work(dlogits):
        grid, form = _scores_launch(logits, score, renormalise)
        logit_gradient_kernel[grid](
            tensors=LogitTensors(logits=logits, dweight=dweight, expert=expert, keep=keep, dlogits=dlogits),
            T=logits.shape[0],
            E=logits.shape[1],
            K=expert.shape[1],
            FORM=form,
            # On sm_80 four warps spill two registers.
            num_warps=8,
        )
    return dlogits


def _scores_launch(logits: Tensor, score: str, renormalise: bool) -> tuple[tuple[int], ScoreForm]:
    """(grid, constants): whole rows of experts, about ELEMENTS of them in a program."""
    block_e = padded(logits.shape[1])
    block_m = max(1, ELEMENTS // block_e)
    form = ScoreForm(SOFTMAX=score == "softmax", RENORMALISE=renormalise, BLOCK_M=block_m, BLOCK_E=block_e)
    return (cdiv(logits.shape[0], block_m),), form


def _save_scores(ctx, inputs, output) -> None:
    logits, _, _, _, _, *ctx.options, _ = inputs
    _, expert, keep, level = output
    ctx.mark_non_differentiable(expert, keep, level)
    ctx.save_for_backward(logits, expert, keep)
    ctx.set_materialize_grads(False)


def _scores_backward(ctx, dweight: Tensor | None, *_: None):
    return None if dweight is None else scores_backward_op(dweight, *ctx.saved_tensors, *ctx.options), *(None,) * 7


scores_op.register_autograd(_scores_backward, setup_context=_save_scores)


@kernel_op("sort_slots")
def sort_op(
    weight: Tensor, expert: Tensor, keep: Tensor | None, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Rows` in their order, and the row of each slot [T, K] (-1 if it is dropped), which the gradient
    needs."""
    (T, K), N = expert.shape, expert.numel()
    shapes = (N, N, n_experts + 1, T + 1, N, (T, K))
    token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N, row_TK = (
        expert.new_empty(shape, dtype=torch.int64) for shape in shapes
    )
    weight_N = weight.new_empty(N)
    if has_work(weight_N):
        n_blocks, buckets = cdiv(N, BLOCK_P), power_of_two(n_experts + 2)
        count = expert.new_empty(n_experts + 1, n_blocks, dtype=torch.int32)
        start = torch.empty_like(count, dtype=torch.int64)
        count_kernel[(n_blocks,)](
            expert_ptr=expert,
            keep_ptr=keep,
            count_ptr=count,
            N=N,
            E=n_experts,
            n_blocks=n_blocks,
            BUCKETS=buckets,
            BLOCK_P=BLOCK_P,
        )
        scan_kernel[(n_experts + 1,)](
            count_ptr=count, start_ptr=start, expert_offsets_ptr=expert_offsets, n_blocks=n_blocks, SCAN=SCAN
        )
        place_kernel[(n_blocks,)](
            expert_ptr=expert,
            keep_ptr=keep,
            weight_ptr=weight,
            start_ptr=start,
            expert_offsets_ptr=expert_offsets,
            rows=RowTensors(
                weight=weight_N,
                token=token_N,
                expert=expert_N,
                token_offsets=token_offsets,
                row_of_slot=row_of_slot_N,
                row=row_TK,
            ),
            N=N,
            K=K,
            E=n_experts,
            n_blocks=n_blocks,
            BLOCK_P=BLOCK_P,
        )
    elif has_work(expert_offsets):
        expert_offsets.zero_()
        token_offsets.zero_()
    return weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N, row_TK


@kernel_op("sort_slots_backward")
def sort_backward_op(dweight_N: Tensor, row_TK: Tensor) -> Tensor:
    dweight, N = dweight_N.new_empty(row_TK.shape), row_TK.numel()
    if has_work(dweight):
        slot_gradient_kernel[(cdiv(N, SCAN),)](
            dweight_N_ptr=dweight_N, row_ptr=row_TK, dweight_ptr=dweight, N=N, BLOCK=SCAN
        )
    return dweight


def _save_sort(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])
    ctx.set_materialize_grads(False)


def _sort_backward(ctx, dweight_N: Tensor | None, *_: None):
    return None if dweight_N is None else sort_backward_op(dweight_N, *ctx.saved_tensors), None, None, None


sort_op.register_autograd(_sort_backward, setup_context=_save_sort)
