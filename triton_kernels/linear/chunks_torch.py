"""The chunked view of a batch of sequences that every linear-attention reference works in.

Chunks hold C tokens each; every sequence starts on a chunk of its own and pads its last one with zeros. Without
`cu_seqlens` each batch row is one sequence; with it B is 1 and the chunks of the packed sequences follow one another.
The work goes over blocks, a few consecutive chunks of all heads: what a block needs is loaded into scratch memory that
all blocks share, worked on while it lies in the cache, and stored back. Legend: B batch, T tokens, G query/key heads,
H heads, R = H / G, N chunks, n chunks of a block, M = B * H, X = n * M, C chunk length, D any width.
"""

import threading
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

# Bytes of a block's rows, its largest operand: a handful of such operands stay in the cores' caches.
BLOCK_BYTES = 1 << 20


class Scratch:
    """Memory by name, the same for every block and call: a fresh temporary is faulted in page by page, which takes
    longer than the work on it."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.derived: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised; valid until the same name is asked for again. The same tensor for the same shape."""
        known = self.views.get((name, shape))
        if known is None:
            size, memory = prod(shape), self.memory.get(name)
            if memory is None or memory.numel() < size:
                self.views.clear()
                self.derived.clear()
                memory = self.memory[name] = torch.empty(size, dtype=self.dtype, device=self.device)
            known = self.views[name, shape] = memory[:size].view(shape)
        return known

    def once(self, derive: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        """derive(x, *arguments), views of a tensor of this memory, kept: making views of a block takes as long as
        working on it."""
        key = (derive, id(x), arguments)
        known = self.derived.get(key)
        if known is None or known[0] is not x:
            known = self.derived[key] = (x, derive(x, *arguments))
        return known[1]


_of_thread = threading.local()


def scratch_on(device: torch.device, dtype: torch.dtype) -> Scratch:
    """The calling thread's own, a few dozen times BLOCK_BYTES."""
    return _of_thread.__dict__.setdefault(f"{device} {dtype}", Scratch(device, dtype))


class Chunks:
    """Where tokens lie among N chunks. `rows` says which of the N * C rows they fill, None where they fill all.
    `starts` and `ends` name the rows of the state tensor whose sequence starts or ends at a chunk. The host reads
    cu_seqlens: this is for the torch references only."""

    def __init__(self, n_tokens: int, size: int, cu_seqlens: Tensor | None):
        offsets = [0, n_tokens] if cu_seqlens is None else cu_seqlens.tolist()
        self.n, self.size = 0, size
        self.starts: dict[int, slice] = {}
        self.ends: dict[int, slice] = {}
        rows = [torch.arange(0)]
        for sequence, (first, last) in enumerate(pairwise(offsets)):
            if first < last:
                states = slice(None) if cu_seqlens is None else slice(sequence, sequence + 1)
                rows.append(torch.arange(last - first) + self.n * size)
                self.starts[self.n] = states
                self.n += -(-(last - first) // size)
                self.ends[self.n - 1] = states
        self.rows = torch.cat(rows) if self.n * size > n_tokens else None

    def blocks(self, bytes_per_chunk: int) -> list[slice]:
        step = max(1, BLOCK_BYTES // bytes_per_chunk)
        return [slice(first, min(first + step, self.n)) for first in range(0, self.n, step)]

    def view(self, x: Tensor, heads: int = 0) -> Tensor:
        """[B, T, G, ...] seen as [N, B, G, R, C, ...], every head H / G times (once if `heads` is 0); a copy where
        there is padding, of zeros."""
        if self.rows is not None:
            padded = x.new_zeros(x.shape[0], self.n * self.size, *x.shape[2:])
            padded[:, self.rows] = x
            x = padded
        chunked = self.chunked(x)[:, :, :, None]
        return chunked.expand(-1, -1, -1, max(1, heads // x.shape[2]), *chunked.shape[4:])

    def empty(self, x: Tensor) -> Tensor:
        """To be filled through `store` and read by `tokens`; laid out as `view` of the tokens of x."""
        return self.chunked(x.new_empty(x.shape[0], self.n * self.size, *x.shape[2:]))

    def chunked(self, x: Tensor) -> Tensor:
        """[B, N * C, G, ...] seen as [N, B, G, C, ...]."""
        return x.unflatten(1, (self.n, self.size)).movedim(0, 1).transpose(2, 3)

    def tokens(self, stored: Tensor) -> Tensor:
        """[N, B, G, C, ...] -> [B, T, G, ...]."""
        x = stored.transpose(2, 3).movedim(1, 0).flatten(1, 2)
        return x if self.rows is None else x[:, self.rows]


def load(chunked: Tensor, out: Tensor, factor: float | Tensor = 1.0) -> Tensor:
    """factor (a number, or [X, C, 1]) times chunks [n, B, G, R, C, ...] -> out [X, ..., C, ...] in its dtype."""
    if isinstance(factor, Tensor):
        torch.mul(chunked, factor.view(*chunked.shape[:5], 1), out=out.view(chunked.shape))
    else:
        out.view(chunked.shape).copy_(chunked)
        if factor != 1:
            out.mul_(factor)
    return out


def store(x: Tensor, chunked: Tensor, factor: float | Tensor = 1.0) -> None:
    """The adjoint of `load`: factor times x [X, C, ...] into chunks [n, B, G, C, ...], summed over the R heads that
    share one of G."""
    heads = x.view(*chunked.shape[:3], -1, *chunked.shape[3:])
    heads = heads[:, :, :, 0] if heads.shape[3] == 1 else heads.sum(3)
    if isinstance(factor, Tensor):
        torch.mul(heads, factor.view(*heads.shape[:4], 1), out=chunked)
    elif factor != 1:
        torch.mul(heads, factor, out=chunked)
    else:
        chunked.copy_(heads)
