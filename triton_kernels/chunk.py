"""The chunked view of a batch of sequences that every linear-attention reference works in.

Chunks hold C tokens each; every sequence starts on a chunk of its own and pads its last one with zeros. Without `cu_seqlens` each batch row is one
sequence; with it B is 1 and the chunks of the packed sequences follow one another. A block is a few consecutive chunks of every head: it is loaded
from the token layout, worked on while it is small enough for the cache, and stored back, so that no operand is ever copied as a whole.
Letters: B batch, T tokens, H heads, n chunks of a block, M = B * H, C chunk length, D any width.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Bytes of one operand of a block. Larger temporaries leave the cache, are returned to the system, and their pages faulted in again at every use.
BLOCK_BYTES = 1 << 19


@dataclass(frozen=True, kw_only=True)
class Block:
    """`starts` and `ends` name the rows of the state tensor whose sequence starts or ends at a chunk of the block. `token_R` is the token in each of
    the block's n * C rows, -1 where a row is padding; None where all rows are the tokens `tokens`."""

    n_chunks: int
    chunk_size: int
    starts: dict[int, slice]
    ends: dict[int, slice]
    tokens: slice
    token_R: Tensor | None

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, ...] -> [n, B * H, C, ...] in `dtype`, zeros in the padding."""
        rows = x[:, self.tokens]
        if self.token_R is not None:
            inside = self.token_R >= 0
            rows = x.new_zeros(x.shape[0], len(inside), *x.shape[2:])
            rows[:, inside] = x[:, self.token_R[inside]]
        chunks = rows.unflatten(1, (self.n_chunks, self.chunk_size)).movedim(0, 1).transpose(2, 3)
        return torch.empty(chunks.shape, dtype=dtype, device=x.device).copy_(chunks).flatten(1, 2)

    def store(self, out: Tensor, x: Tensor) -> None:
        """The inverse of `load`, into the tokens of `out` [B, T, H, ...]."""
        chunks = x.unflatten(1, (out.shape[0], out.shape[2])).movedim(1, 0).transpose(2, 3)
        if self.token_R is None:
            out[:, self.tokens].unflatten(1, chunks.shape[1:3]).copy_(chunks)
        else:
            inside = self.token_R >= 0
            out[:, self.token_R[inside]] = chunks.flatten(1, 2)[:, inside].to(out.dtype)


def chunk_blocks(n_tokens: int, chunk_size: int, cu_seqlens: Tensor | None, bytes_per_chunk: int) -> list[Block]:
    """T tokens in chunks of C, in blocks of about BLOCK_BYTES per operand. The host reads cu_seqlens: this is for the torch references only."""
    offsets = [0, n_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    states = [slice(None)] if cu_seqlens is None else [slice(s, s + 1) for s in range(len(offsets) - 1)]
    starts: dict[int, slice] = {}
    ends: dict[int, slice] = {}
    tokens: list[Tensor] = []
    n_chunks = 0
    for state, (first, last) in zip(states, pairwise(offsets)):
        chunks = -(-(last - first) // chunk_size)
        if chunks:
            starts[n_chunks], ends[n_chunks + chunks - 1] = state, state
            n_chunks += chunks
        padded = torch.arange(first, first + chunks * chunk_size)
        tokens.append(padded.masked_fill_(padded >= last, -1))
    token_R = torch.cat(tokens)

    step = max(1, BLOCK_BYTES // bytes_per_chunk)
    blocks = []
    for chunk0 in range(0, n_chunks, step):
        n = min(step, n_chunks - chunk0)
        rows = token_R[chunk0 * chunk_size : (chunk0 + n) * chunk_size]
        blocks.append(
            Block(
                n_chunks=n,
                chunk_size=chunk_size,
                starts={i: starts[chunk0 + i] for i in range(n) if chunk0 + i in starts},
                ends={i: ends[chunk0 + i] for i in range(n) if chunk0 + i in ends},
                tokens=slice(int(rows[0]), int(rows[0]) + n * chunk_size),
                token_R=rows if bool((rows < 0).any()) else None,
            )
        )
    return blocks
