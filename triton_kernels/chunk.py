"""The chunked view of a batch of sequences that every linear-attention reference works in.

Rows become chunks [B, N, H, C, D]: N chunks of C rows, the last one of a sequence padded with zeros. Without `cu_seqlens` each batch row is one
sequence; with it B is 1 and the chunks of the packed sequences follow one another along N, each starting on a chunk of its own.
Letters: B batch, T tokens, H heads, D any width, N chunks, C chunk length, K key width, V value width, S sequences.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """spans: (first chunk, past the last chunk, rows of the state tensor) of each run of chunks that shares one state."""

    chunk_size: int
    n_tokens: int
    n_chunks: int
    spans: tuple[tuple[int, int, slice], ...]
    # Packed sequences only: the token in each chunk row, n_tokens where the row is padding; and the chunk row of each token.
    token_NC: torch.Tensor | None = None
    row_T: torch.Tensor | None = None

    def to_chunks(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> contiguous [B, N, H, C, D], zeros in the padding."""
        padding = self.n_chunks * self.chunk_size - self.n_tokens
        if self.token_NC is not None:
            x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, 1))[:, self.token_NC.reshape(-1)]
        elif padding:
            x_BTHD = F.pad(x_BTHD, (0, 0, 0, 0, 0, padding))
        return x_BTHD.unflatten(1, (self.n_chunks, self.chunk_size)).transpose(2, 3).contiguous()

    def from_chunks(self, x_BNHCD: torch.Tensor) -> torch.Tensor:
        """[B, N, H, C, D] -> [B, T, H, D]."""
        x_BTHD = x_BNHCD.transpose(2, 3).flatten(1, 2)
        return x_BTHD[:, : self.n_tokens] if self.row_T is None else x_BTHD[:, self.row_T]


def chunk_layout(n_tokens: int, chunk_size: int, cu_seqlens: torch.Tensor | None) -> ChunkLayout:
    """The layout of T tokens in chunks of C. Packed sequences are read on the host, so this is for the torch references only."""
    if cu_seqlens is None:
        n_chunks = -(-n_tokens // chunk_size)
        return ChunkLayout(chunk_size=chunk_size, n_tokens=n_tokens, n_chunks=n_chunks, spans=((0, n_chunks, slice(None)),))
    offsets = cu_seqlens.tolist()
    token_NC, spans, n_chunks = [], [], 0
    for sequence, (first, last) in enumerate(pairwise(offsets)):
        chunks = -(-(last - first) // chunk_size)
        tokens = torch.arange(first, first + chunks * chunk_size)
        token_NC.append(torch.where(tokens < last, tokens, n_tokens))
        spans.append((n_chunks, n_chunks + chunks, slice(sequence, sequence + 1)))
        n_chunks += chunks
    flat_tokens = torch.cat(token_NC)
    row_T = (flat_tokens < n_tokens).nonzero().squeeze(1)
    return ChunkLayout(
        chunk_size=chunk_size,
        n_tokens=n_tokens,
        n_chunks=n_chunks,
        spans=tuple(spans),
        token_NC=flat_tokens.view(-1, chunk_size).to(cu_seqlens.device),
        row_T=row_T.to(cu_seqlens.device),
    )


def scan_states(
    decay_BNHK: torch.Tensor, update_BNHKV: torch.Tensor, initial_SHKV: torch.Tensor, layout: ChunkLayout, *, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence over chunks S <- decay_n S + update_n of each sequence, in the dtype of `update` (fp32, or fp64 in tests).

    decay_BNHK is [B, N, H, K], or [B, N, H, 1] for one decay per head. Returns the state *before* each chunk [B, N, H, K, V] and the state after
    the last [S, H, K, V]. `reverse` runs from the last chunk to the first: the adjoint, whose "before" is the gradient at a chunk's end.
    """
    states_BNHKV = torch.empty_like(update_BNHKV)
    final_SHKV = initial_SHKV.clone()
    for first, last, rows in layout.spans:
        state = initial_SHKV[rows]
        for n in reversed(range(first, last)) if reverse else range(first, last):
            states_BNHKV[:, n] = state
            state = torch.addcmul(update_BNHKV[:, n], decay_BNHK[:, n, :, :, None], state)
        final_SHKV[rows] = state
    return states_BNHKV, final_SHKV
