"""The experts on the CPU: batched products over blocks of experts of similar load, with backward written by hand.

What it is built around, in the order it matters on a CPU:
- Fresh memory is slow: the kernel clears every new page, 0.1 to 2 ms per MB. Apart from the pre-activations that
  backward needs and what a caller receives, nothing of the size of all rows exists: everything else lives in scratch of
  one block, sized to stay in cache, and the outputs of a block are added to their tokens at once, in fp32.
- bf16 calls are slow: 80 small products one by one take three to five times as long as one batched product. Experts are
  sorted by load and cut into blocks; within a block all are padded to the same number of rows, of weight zero, and
  every operation runs once per block. Experts with rows enough to fill the scratch are blocks of their own: at that
  size, and for fp32 without a row of padding, this is the plain loop.
- New shapes are slow in bf16: oneDNN builds a program per shape and keeps 1,024 of them, and the numbers of rows per
  expert never repeat. Rounded up to a multiple of `ROW_QUANTUM`, in blocks of one size, they do. fp32 products build no
  programs and are not rounded.
- Weights of another dtype than the activations (fp32 masters under bf16 activations) are cast per block, and their
  gradients are written once, from scratch; experts without rows, which are most of them when one token is decoded, are
  not even read.

The order of additions depends on the assignments alone, so the same inputs give the same bits.
Backward: with A the activation and dA' = W_down dy (not yet weighted), the gradient of a row's weight is <dA', A>;
expert outputs are never kept.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows, P padded rows, G experts of a block, M rows
of each of them, n = G * M the rows of one block, I and O the inner and outer width of a weight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from routing.assignments import Assignments

# Scratch of one block: large enough to amortise the calls, small enough for a core's share of the cache.
BLOCK_BYTES = 2**21
MOST_EXPERTS = 8
# Half a quantum per expert is wasted; below the least rows that is too much, and the numbers of rows repeat anyway.
ROW_QUANTUM = 16
LEAST_ROWS = 64


class Block(NamedTuple):
    """Experts of similar load: `experts` are G expert numbers, `rows` their G * `height` padded rows."""

    experts: list[int]
    rows: slice
    height: int


def expert_blocks(rows_E: list[int], row_bytes: int, quantum: int) -> list[Block]:
    """The experts that have rows, by falling load, in blocks of one number of experts (the last may hold fewer)."""
    order = sorted((e for e, rows in enumerate(rows_E) if rows), key=lambda e: -rows_E[e])
    if not order:
        return []
    mean_bytes = sum(rows_E) / len(order) * row_bytes
    # A power of two, so that small changes of the mean do not change the shapes.
    size = 1
    while 2 * size <= MOST_EXPERTS and 2 * size * mean_bytes <= BLOCK_BYTES:
        size *= 2
    blocks, start = [], 0
    for first in range(0, len(order), size):
        experts = order[first : first + size]
        most = rows_E[experts[0]]
        height = most if most < LEAST_ROWS else -(-most // quantum) * quantum
        blocks.append(Block(experts, slice(start, start + len(experts) * height), height))
        start += len(experts) * height
    return blocks


def experts_on_cpu(x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, rows: Assignments) -> Tensor:
    """`moe.backends.compute_experts` on the CPU; arguments and result as there."""
    rows_E = rows.rows_per_expert_E()
    d_expert, d_model = w_down_EFD.shape[1:]
    quantum = 1 if x_TD.dtype in (torch.float32, torch.float64) else ROW_QUANTUM
    blocks = expert_blocks(rows_E.tolist(), (d_model + 3 * d_expert) * x_TD.element_size(), quantum)
    place_N = padded_places(blocks, rows_E)
    n_rows, n_padded = place_N.shape[0], blocks[-1].rows.stop if blocks else 0
    token_P = rows.token_N.new_zeros(n_padded).index_copy_(0, place_N, rows.token_N[:n_rows])
    weight_P = rows.weight_N.new_zeros(n_padded).index_copy(0, place_N, rows.weight_N[:n_rows])
    y_TD = ExpertsOnCpu.apply(x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, blocks)
    assert isinstance(y_TD, Tensor)
    return y_TD


def padded_places(blocks: list[Block], rows_E: Tensor) -> Tensor:
    """The padded row of each assigned row, int64 [N]."""
    starts_E = [0] * len(rows_E)
    for experts, rows, height in blocks:
        for i, e in enumerate(experts):
            starts_E[e] = rows.start + i * height
    start_E = torch.tensor(starts_E)
    n_rows = int(rows_E.sum())
    return torch.arange(n_rows) + torch.repeat_interleave(
        start_E - (rows_E.cumsum(0) - rows_E), rows_E, output_size=n_rows
    )


class TokenSum:
    """Sums of rows per token, in fp32 or better, without ever holding all rows."""

    def __init__(self, like_TD: Tensor, most_rows: int):
        self.dtype = like_TD.dtype
        self.sum_TD = torch.zeros_like(like_TD, dtype=torch.promote_types(self.dtype, torch.float32))
        self.wide_nD = self.sum_TD.new_empty(0 if self.sum_TD.dtype == self.dtype else most_rows, like_TD.shape[1])

    def add(self, token_n: Tensor, rows_nD: Tensor) -> None:
        if self.sum_TD.dtype != self.dtype:
            rows_nD = self.wide_nD[: len(rows_nD)].copy_(rows_nD)
        self.sum_TD.index_add_(0, token_n, rows_nD)

    def result(self) -> Tensor:
        return self.sum_TD.to(self.dtype)


class WeightScratch:
    """Weights of a block's experts in the dtype of the activations, and the way back for their gradients."""

    def __init__(self, blocks: list[Block], packed_EIO: Tensor, dtype: torch.dtype):
        most = max((len(block.experts) for block in blocks), default=0)
        self.packed_EIO, self.scratch_GIO = packed_EIO, packed_EIO.new_empty(most, *packed_EIO.shape[1:], dtype=dtype)
        # One expert of the right dtype is used where it lies.
        self.in_place = most == 1 and packed_EIO.dtype == dtype

    def weights(self, experts: list[int]) -> Tensor:
        """[G, I, O], valid until the next call of any method."""
        if self.in_place:
            return self.packed_EIO[experts[0] : experts[0] + 1]
        for i, e in enumerate(experts):
            self.scratch_GIO[i].copy_(self.packed_EIO[e])
        return self.scratch_GIO[: len(experts)]

    def write_gradient(self, gradient_EIO: Tensor, experts: list[int], left_GMI: Tensor, right_GMO: Tensor) -> None:
        """gradient[e] = left^T right for the experts of a block."""
        if self.in_place:
            torch.bmm(left_GMI.mT, right_GMO, out=gradient_EIO[experts[0] : experts[0] + 1])
            return
        product_GIO = torch.bmm(left_GMI.mT, right_GMO, out=self.scratch_GIO[: len(experts)])
        for i, e in enumerate(experts):
            gradient_EIO[e].copy_(product_GIO[i])


class ExpertsOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_gate_up_EDF2: Tensor,
        w_down_EFD: Tensor,
        token_P: Tensor,
        weight_P: Tensor,
        blocks: list[Block],
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        dtype, (d_expert, d_model) = x_TD.dtype, w_down_EFD.shape[1:]
        most_rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
        wide, narrow = x_TD.new_empty(most_rows, d_model), x_TD.new_empty(most_rows, d_expert)
        h_PF2, row_weight_P1 = x_TD.new_empty(token_P.shape[0], 2 * d_expert), weight_P.to(dtype)[:, None]
        gate_up, down, y = (
            WeightScratch(blocks, w_gate_up_EDF2, dtype),
            WeightScratch(blocks, w_down_EFD, dtype),
            TokenSum(x_TD, most_rows),
        )
        for experts, rows, height in blocks:
            n, shape = rows.stop - rows.start, (len(experts), height, -1)
            x_n, a_n, h_n = wide[:n], narrow[:n], h_PF2[rows]
            torch.index_select(x_TD, 0, token_P[rows], out=x_n)
            torch.bmm(x_n.view(shape), gate_up.weights(experts), out=h_n.view(shape))
            # SiLU is several times faster on rows that lie close together.
            a_n.copy_(h_n[:, :d_expert])
            torch.ops.aten.silu.out(a_n, out=a_n)
            a_n.mul_(h_n[:, d_expert:])
            a_n.mul_(row_weight_P1[rows])
            # The inputs are not needed any more: their scratch takes the outputs.
            torch.bmm(a_n.view(shape), down.weights(experts), out=x_n.view(shape))
            y.add(token_P[rows], x_n)
        ctx.save_for_backward(x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, h_PF2)
        ctx.blocks = blocks
        return y.result()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TD, w_gate_up_EDF2, w_down_EFD, token_P, weight_P, h_PF2 = ctx.saved_tensors
        dy_TD, blocks = dy_TD.contiguous(), ctx.blocks
        dtype, (d_expert, d_model) = x_TD.dtype, w_down_EFD.shape[1:]
        most_rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
        wide, narrow = x_TD.new_empty(2, most_rows, d_model), x_TD.new_empty(6, most_rows, d_expert)
        d_gate_up, d_down = torch.empty_like(w_gate_up_EDF2), torch.empty_like(w_down_EFD)
        gate_up, down, dx = (
            WeightScratch(blocks, w_gate_up_EDF2, dtype),
            WeightScratch(blocks, w_down_EFD, dtype),
            TokenSum(x_TD, most_rows),
        )
        d_weight_P, row_weight_P1 = torch.empty_like(weight_P, dtype=dtype), weight_P.to(dtype)[:, None]
        for experts, rows, height in blocks:
            n, shape = rows.stop - rows.start, (len(experts), height, -1)
            x_n, dy_n = wide[0, :n], wide[1, :n]
            da_n, silu_n, a_n, gate_n = narrow[0, :n], narrow[1, :n], narrow[2, :n], narrow[3, :n]
            dh_n = narrow[4:].view(-1)[: n * 2 * d_expert].view(n, 2 * d_expert)
            up_n = h_PF2[rows, d_expert:]
            torch.index_select(dy_TD, 0, token_P[rows], out=dy_n)
            torch.index_select(x_TD, 0, token_P[rows], out=x_n)
            torch.bmm(dy_n.view(shape), down.weights(experts).mT, out=da_n.view(shape))
            gate_n.copy_(h_PF2[rows, :d_expert])
            torch.ops.aten.silu.out(gate_n, out=silu_n)
            torch.mul(silu_n, up_n, out=a_n)
            torch.linalg.vecdot(da_n, a_n, out=d_weight_P[rows])
            # Padding rows have weight zero, so nothing of them reaches the gradients of the experts.
            a_n.mul_(row_weight_P1[rows])
            da_n.mul_(row_weight_P1[rows])
            torch.mul(da_n, silu_n, out=dh_n[:, d_expert:])
            da_n.mul_(up_n)
            torch.ops.aten.silu_backward.grad_input(da_n, gate_n, grad_input=da_n)
            dh_n[:, :d_expert].copy_(da_n)
            down.write_gradient(d_down, experts, a_n.view(shape), dy_n.view(shape))
            gate_up.write_gradient(d_gate_up, experts, x_n.view(shape), dh_n.view(shape))
            torch.bmm(dh_n.view(shape), gate_up.weights(experts).mT, out=dy_n.view(shape))
            dx.add(token_P[rows], dy_n)
        used = {e for block in blocks for e in block.experts}
        if idle := [e for e in range(d_down.shape[0]) if e not in used]:
            d_down[idle], d_gate_up[idle] = 0, 0
        return dx.result(), d_gate_up, d_down, None, d_weight_P.to(weight_P.dtype), None
