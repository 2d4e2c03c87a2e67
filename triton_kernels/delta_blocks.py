"""Blocks of chunks: how the torch references of the delta rules walk through a batch.

A block holds a few consecutive chunks of every head. It is loaded from the token layout, worked on while it is small enough for the cache, and
stored back, so that no operand is ever copied as a whole.
Letters: B batch, T tokens, G query/key heads, H value heads, n chunks of a block, M = B * H, C chunk length, R = 2C, K key width, D any width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from triton_kernels.chunk import ChunkLayout

# Elements of one operand of a block: half a MiB in fp32. Larger temporaries are returned to the system and their pages faulted in again at every use.
BLOCK_ELEMENTS = 1 << 17
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Block:
    """Chunks [first, last); `starts` and `ends` name the rows of the state tensor whose sequence starts or ends at a chunk."""

    layout: ChunkLayout
    first: int
    last: int
    starts: dict[int, slice]
    ends: dict[int, slice]

    def tokens(self) -> tuple[slice, Tensor | None]:
        """The tokens of the block, which follow one another, and the padded rows they fill (None where they fill the first ones)."""
        C, layout = self.layout.chunk_size, self.layout
        if layout.row_T is None:
            return slice(self.first * C, min(self.last * C, layout.n_tokens)), None
        begin, end = torch.searchsorted(layout.row_T, torch.tensor([self.first * C, self.last * C], device=layout.row_T.device)).tolist()
        return slice(begin, end), layout.row_T[begin:end] - self.first * C

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, ...] -> [n, B * H, C, ...] in `dtype`, zeros in the padding."""
        tokens, rows = self.tokens()
        batch, _, heads, *rest = x.shape
        n, C = self.last - self.first, self.layout.chunk_size
        padded = x.new_empty(n, batch, heads, C, *rest, dtype=dtype)
        flat = padded.movedim(1, 0).transpose(2, 3)
        x = x[:, tokens]
        if rows is None and x.shape[1] == n * C:
            flat.copy_(x.unflatten(1, (n, C)))
        else:
            filled = x.new_zeros(batch, n * C, heads, *rest)
            filled[:, slice(x.shape[1]) if rows is None else rows] = x
            flat.copy_(filled.unflatten(1, (n, C)))
        return padded.flatten(1, 2)

    def store(self, out: Tensor, x: Tensor) -> None:
        """The inverse of `load`, into the tokens of `out` [B, T, H, ...]."""
        tokens, rows = self.tokens()
        x = x.unflatten(1, (out.shape[0], out.shape[2])).movedim(1, 0).transpose(2, 3)
        target = out[:, tokens]
        if rows is None and target.shape[1] == x.shape[1] * x.shape[2]:
            target.unflatten(1, x.shape[1:3]).copy_(x)
        else:
            target.copy_(x.flatten(1, 2)[:, slice(target.shape[1]) if rows is None else rows])


def blocks_of(layout: ChunkLayout, elements_per_chunk: int) -> list[Block]:
    """The chunks of the layout in blocks of about BLOCK_ELEMENTS."""
    starts = {first: rows for first, last, rows in layout.spans if first < last}
    ends = {last - 1: rows for first, last, rows in layout.spans if first < last}
    step = max(1, BLOCK_ELEMENTS // elements_per_chunk)
    return [Block(layout=layout, first=n, last=min(n + step, layout.n_chunks), starts=starts, ends=ends) for n in range(0, layout.n_chunks, step)]


def load_qk(block: Block, q_BTGK: Tensor, k_BTGK: Tensor, heads: int, dtype: torch.dtype, scale: float, normalize_qk: bool) -> Tensor:
    """Queries (scaled) stacked on keys, for every value head: [n, M, R, K]."""
    parts = []
    for x, factor in ((q_BTGK, scale), (k_BTGK, 1.0)):
        rows = block.load(x, dtype)
        if normalize_qk:
            rows *= inverse_length(rows)
        parts.append(rows.mul_(factor) if factor != 1.0 else rows)
    group = heads // q_BTGK.shape[2]
    return torch.cat([x.repeat_interleave(group, 1) for x in parts] if group > 1 else parts, 2)


def store_qk_gradients(
    block: Block, dqk: Tensor, q_BTGK: Tensor, k_BTGK: Tensor, dq_BTGK: Tensor, dk_BTGK: Tensor, scale: float, normalize_qk: bool
) -> None:
    """The adjoint of `load_qk`: dqk [n, M, R, K] into the tokens of dq and dk."""
    heads = q_BTGK.shape[0] * q_BTGK.shape[2]
    if dqk.shape[1] != heads:
        dqk = dqk.unflatten(1, (heads, -1)).sum(2)
    dq, dk = dqk.chunk(2, dim=2)
    for x, grad, factor, out in ((q_BTGK, dq, scale, dq_BTGK), (k_BTGK, dk, 1.0, dk_BTGK)):
        grad = grad * factor if factor != 1.0 else grad
        if normalize_qk:
            rows = block.load(x, grad.dtype)
            length = inverse_length(rows)
            rows *= length
            grad = (grad - rows * (grad * rows).sum(-1, keepdim=True)) * length
        block.store(out, grad)


def inverse_length(x: Tensor) -> Tensor:
    """1 / length over the last axis, finite for rows of zeros."""
    return (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()


def product(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """base + a @ b of [n, M, ., .] stacks, as one batch that is read in place (torch.matmul would copy transposed operands)."""
    if base is None:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[3])
    return torch.baddbmm(base.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1)).view(base.shape)
