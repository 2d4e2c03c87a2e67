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
    """`starts` and `ends` name the rows of the state tensor whose sequence starts or ends at a chunk of the block. Its tokens follow one another;
    `rows` says which of its n * C rows they fill, None where they fill all."""

    n_chunks: int
    chunk_size: int
    starts: dict[int, slice]
    ends: dict[int, slice]
    tokens: slice
    rows: Tensor | None

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, ...] -> [n, B * H, C, ...] in `dtype`, zeros in the padding."""
        x = x[:, self.tokens]
        if self.rows is not None:
            tokens, x = x, x.new_zeros(x.shape[0], self.n_chunks * self.chunk_size, *x.shape[2:])
            x[:, self.rows] = tokens
        chunks = x.unflatten(1, (self.n_chunks, self.chunk_size)).movedim(0, 1).transpose(2, 3)
        return torch.empty(chunks.shape, dtype=dtype, device=x.device).copy_(chunks).flatten(1, 2)

    def store(self, out: Tensor, x: Tensor) -> None:
        """The inverse of `load`, into the tokens of `out` [B, T, H, ...]."""
        chunks = x.unflatten(1, (out.shape[0], out.shape[2])).movedim(1, 0).transpose(2, 3)
        if self.rows is None:
            out[:, self.tokens].unflatten(1, chunks.shape[1:3]).copy_(chunks)
        else:
            out[:, self.tokens] = chunks.flatten(1, 2)[:, self.rows].to(out.dtype)


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
                n_chunks=len(here),
                chunk_size=chunk_size,
                starts={n - chunk0: states for n, states in starts.items() if chunk0 <= n < chunk0 + step},
                ends={n - chunk0: states for n, states in ends.items() if chunk0 <= n < chunk0 + step},
                tokens=slice(here[0][0], here[0][0] + len(rows)),
                rows=torch.tensor(rows) if len(rows) < len(here) * chunk_size else None,
            )
        )
    return blocks
