"""sort_slots on Triton: one pass of a counting sort, in three launches, without atomics and without the host.

1. Each block of slots counts its slots per bucket: the experts, and one more bucket for dropped slots.
2. An exclusive prefix sum over (bucket, block) turns the counts into the row at which each block's share of each bucket starts.
3. Each block places its slots there; equal ones keep their order, which their rank among the block's slots gives.
Backward is one gather.

How many slots were dropped before slot i follows from the last bucket's row starts, and with it the place of i among the kept ones.

Legend: T tokens, K slots per token, E experts, N slots or rows, B blocks of slots, P slots of a block.
"""

# Constants given as Python values are beyond a type checker.
# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.flash_attention_blocks import wide
from triton_kernels.registration import has_work, kernel_op

BLOCK_P = 128
SCAN = 512


@triton.jit
def slot_buckets(expert_ptr, keep_ptr, slot_P, N, E):
    """The bucket of each slot: its expert, E if dropped, E + 1 if there is no such slot."""
    bucket_P = tl.load(expert_ptr + slot_P, mask=slot_P < N, other=0).to(tl.int32)
    if keep_ptr is not None:
        bucket_P = tl.where(tl.load(keep_ptr + slot_P, mask=slot_P < N, other=0).to(tl.int1), bucket_P, E)
    return tl.where(slot_P < N, bucket_P, E + 1)


@triton.jit
def count_kernel(expert_ptr, keep_ptr, count_ptr, N, E, n_blocks, BUCKETS: tl.constexpr, BLOCK_P: tl.constexpr):
    """count [E + 1, B]."""
    slot_P = wide(tl.program_id(0)) * BLOCK_P + tl.arange(0, BLOCK_P)
    count_E = tl.histogram(slot_buckets(expert_ptr, keep_ptr, slot_P, N, E), BUCKETS)
    e_E = tl.arange(0, BUCKETS)
    tl.store(count_ptr + wide(e_E) * n_blocks + tl.program_id(0), count_E, mask=e_E <= E)


@triton.jit
def scan_kernel(count_ptr, start_ptr, expert_offsets_ptr, n_blocks, SCAN: tl.constexpr):
    """start [E + 1, B], the exclusive prefix sum of count in that order, and expert_offsets [E + 1], its first column. A program per bucket."""
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
        tl.store(start_ptr + bucket * n_blocks + block_P, before + tl.cumsum(count_P) - count_P, mask=block_P < n_blocks)
        before += tl.sum(count_P)


@triton.jit
def place_kernel(
    expert_ptr, weight_ptr, keep_ptr, start_ptr, expert_offsets_ptr,
    weight_N_ptr, token_N_ptr, expert_N_ptr, token_offsets_ptr, row_of_slot_ptr, row_ptr, N, K, E, n_blocks, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Everything that has an entry per slot; row [N] is the row of each slot, dropped ones included."""
    slot_P = wide(tl.program_id(0)) * BLOCK_P + tl.arange(0, BLOCK_P)
    bucket_P = slot_buckets(expert_ptr, keep_ptr, slot_P, N, E)
    exists_P = slot_P < N
    earlier_PP = tl.arange(0, BLOCK_P)[:, None] > tl.arange(0, BLOCK_P)[None, :]
    rank_P = tl.sum((earlier_PP & (bucket_P[:, None] == bucket_P[None, :])).to(tl.int32), 1)
    row_P = tl.load(start_ptr + wide(bucket_P) * n_blocks + tl.program_id(0), mask=exists_P, other=0) + rank_P
    token_P = slot_P // K
    weight_P = tl.load(weight_ptr + slot_P, mask=exists_P, other=0.0)
    tl.store(weight_N_ptr + row_P, tl.where(bucket_P < E, weight_P, 0.0), mask=exists_P)
    tl.store(token_N_ptr + row_P, token_P, mask=exists_P)
    tl.store(expert_N_ptr + row_P, wide(bucket_P), mask=exists_P)
    tl.store(row_ptr + slot_P, row_P, mask=exists_P)
    n_kept = tl.load(expert_offsets_ptr + E)
    dropped_P = tl.load(start_ptr + wide(E) * n_blocks + tl.program_id(0)) - n_kept + tl.sum((earlier_PP & (bucket_P == E)[None, :]).to(tl.int32), 1)
    place_P = tl.where(bucket_P < E, slot_P - dropped_P, n_kept + dropped_P)
    tl.store(row_of_slot_ptr + place_P, row_P, mask=exists_P)
    tl.store(token_offsets_ptr + token_P, slot_P - dropped_P, mask=exists_P & (slot_P % K == 0))
    if tl.program_id(0) == 0:
        tl.store(token_offsets_ptr + N // K, n_kept)


@triton.jit
def slot_gradient_kernel(dweight_N_ptr, row_ptr, keep_ptr, dweight_ptr, N, BLOCK: tl.constexpr):
    """Each kept slot's weight gradient from its row, zero for dropped slots."""
    slot_P = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    kept_P = slot_P < N
    if keep_ptr is not None:
        kept_P = kept_P & tl.load(keep_ptr + slot_P, mask=kept_P, other=0).to(tl.int1)
    row_P = tl.load(row_ptr + slot_P, mask=kept_P, other=0)
    tl.store(dweight_ptr + slot_P, tl.load(dweight_N_ptr + row_P, mask=kept_P, other=0.0), mask=slot_P < N)


@kernel_op("sort_slots")
def sort_slots_op(
    weight: Tensor, expert: Tensor, keep: Tensor | None, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Rows` in their order, and the row of each slot, which the gradient needs."""
    (T, K), N = expert.shape, expert.numel()
    sizes = (N, N, n_experts + 1, T + 1, N, N)
    token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N, row_N = (expert.new_empty(size, dtype=torch.int64) for size in sizes)
    weight_N = weight.new_empty(N)
    if has_work(weight_N):
        n_blocks, keep = triton.cdiv(N, BLOCK_P), keep if keep is None else keep.contiguous()
        count = expert.new_empty(n_experts + 1, n_blocks, dtype=torch.int32)
        start, expert = torch.empty_like(count, dtype=torch.int64), expert.contiguous()
        buckets = triton.next_power_of_2(n_experts + 2)
        count_kernel[(n_blocks,)](expert, keep, count, N, n_experts, n_blocks, BUCKETS=buckets, BLOCK_P=BLOCK_P)
        scan_kernel[(n_experts + 1,)](count, start, expert_offsets, n_blocks, SCAN=SCAN)
        sorted_by = (expert, weight.contiguous(), keep, start, expert_offsets)
        rows = (weight_N, token_N, expert_N, token_offsets, row_of_slot_N, row_N)
        place_kernel[(n_blocks,)](*sorted_by, *rows, N, K, n_experts, n_blocks, BLOCK_P=BLOCK_P)
    elif has_work(expert_offsets):
        expert_offsets.zero_()
        token_offsets.zero_()
    return weight_N, token_N, expert_N, expert_offsets, token_offsets, row_of_slot_N, row_N


@kernel_op("sort_slots_backward")
def sort_slots_backward_op(dweight_N: Tensor, row_N: Tensor, keep: Tensor | None, n_slots: int) -> Tensor:
    N = dweight_N.shape[0]
    dweight = dweight_N.new_empty(N // n_slots, n_slots)
    if has_work(dweight):
        keep = keep if keep is None else keep.contiguous()
        slot_gradient_kernel[(triton.cdiv(N, SCAN),)](dweight_N.contiguous(), row_N, keep, dweight, N, BLOCK=SCAN)
    return dweight


def _save(ctx, inputs, output) -> None:
    weight, _, keep, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1], keep)
    ctx.set_materialize_grads(False)
    ctx.n_slots = weight.shape[1]


def _backward(ctx, dweight_N: Tensor | None, *_: None):
    return None if dweight_N is None else sort_slots_backward_op(dweight_N, *ctx.saved_tensors, ctx.n_slots), None, None, None


sort_slots_op.register_autograd(_backward, setup_context=_save)
