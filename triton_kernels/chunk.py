"""The chunked view of a batch of sequences that every linear-attention reference works in.

Chunks hold C tokens each; every sequence starts on a chunk of its own and pads its last one with zeros. Without `cu_seqlens` each batch row is one
sequence; with it B is 1 and the chunks of the packed sequences follow one another. A block is a few consecutive chunks of every head: it is loaded
from the token layout into scratch memory that all blocks share, worked on while it lies in the cache, and stored back.
Letters: B batch, T tokens, G query/key heads, H heads, n chunks of a block, M = B * H, C chunk length, D any width.
"""

import threading
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

# Bytes of one operand of a block: a handful of them stay in a core's cache.
BLOCK_BYTES = 1 << 20


class Scratch:
    """Memory by name, the same for every block and call: a fresh temporary is faulted in page by page, which takes longer than the work on it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised; valid until the same name is asked for again."""
        size, known = prod(shape), self.memory.get((name, dtype))
        if known is None or known.numel() < size:
            known = self.memory[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return known[:size].view(shape)


_of_thread = threading.local()


def scratch_on(device: torch.device) -> Scratch:
    """The calling thread's own, a few dozen times BLOCK_BYTES; while compiling a new one, whose memory the compiler plans."""
    if torch.compiler.is_compiling():
        return Scratch(device)
    return _of_thread.__dict__.setdefault(str(device), Scratch(device))


@dataclass(frozen=True, kw_only=True)
class Block:
    """`chunks` are its places in the order of all chunks. `starts` and `ends` name the rows of the state tensor whose sequence starts or ends at a
    chunk of the block. Its tokens follow one another; `rows` says which of its n * C rows they fill, None where they fill all."""

    chunks: slice
    n_chunks: int
    chunk_size: int
    starts: dict[int, slice]
    ends: dict[int, slice]
    tokens: slice
    rows: Tensor | None

    def load(self, x: Tensor, out: Tensor) -> Tensor:
        """[B, T, G, ...] -> out [n, B * H, C, ...] in its dtype, every head H / G times, zeros in the padding."""
        tokens = x[:, self.tokens]
        if self.rows is not None:
            padded = x.new_zeros(x.shape[0], self.n_chunks * self.chunk_size, *x.shape[2:])
            padded[:, self.rows] = tokens
            tokens = padded
        chunks = self.chunked(tokens)
        out.unflatten(1, (*chunks.shape[1:3], -1)).copy_(chunks[:, :, :, None])
        return out

    def store(self, out: Tensor, x: Tensor) -> None:
        """The adjoint of `load`: x [n, B * H, C, ...] into the tokens of out [B, T, G, ...], summed over the heads that share one of G."""
        heads = x.unflatten(1, (out.shape[0], out.shape[2], -1))
        chunks = heads.squeeze(3) if heads.shape[3] == 1 else heads.sum(3)
        if self.rows is None:
            self.chunked(out[:, self.tokens]).copy_(chunks)
        else:
            out[:, self.tokens] = chunks.movedim(1, 0).transpose(2, 3).flatten(1, 2)[:, self.rows].to(out.dtype)

    def chunked(self, tokens: Tensor) -> Tensor:
        """[B, n * C, G, ...] seen as [n, B, G, C, ...]."""
        return tokens.unflatten(1, (self.n_chunks, self.chunk_size)).movedim(0, 1).transpose(2, 3)


def chunk_blocks(n_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, bytes_per_chunk: int) -> list[Block]:
    """T tokens in chunks of C, in blocks of about BLOCK_BYTES per operand. The host reads cu_seqlens: this is for the torch references only."""
    offsets = [0, n_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    # (first token, tokens) of each chunk.
    chunks: list[tuple[int, int]] = []
    starts: dict[int, slice] = {}
    ends: dict[int, slice] = {}
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        if first < last:
            states = slice(None) if cu_seqlens is None else slice(sequence, sequence + 1)
            starts[len(chunks)] = states
            chunks += [(token, min(chunk_size, last - token)) for token in range(first, last, chunk_size)]
            ends[len(chunks) - 1] = states
    step = max(1, BLOCK_BYTES // bytes_per_chunk)
    blocks = []
    for chunk0 in range(0, len(chunks), step):
        here = chunks[chunk0 : chunk0 + step]
        rows = [i * chunk_size + row for i, (_, size) in enumerate(here) for row in range(size)]
        blocks.append(
            Block(
                chunks=slice(chunk0, chunk0 + len(here)),
                n_chunks=len(here),
                chunk_size=chunk_size,
                starts={n - chunk0: states for n, states in starts.items() if chunk0 <= n < chunk0 + step},
                ends={n - chunk0: states for n, states in ends.items() if chunk0 <= n < chunk0 + step},
                tokens=slice(here[0][0], here[0][0] + len(rows)),
                rows=torch.tensor(rows) if len(rows) < len(here) * chunk_size else None,
            )
        )
    return blocks
