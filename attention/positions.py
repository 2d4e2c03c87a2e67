"""Where the tokens of a call stand: one place for all sequences, or, in a cache whose sequences have seen different
numbers of tokens, one token of each at a place of its own.

Legend: B batch, T tokens, H heads, K head width.
"""

import functools

import torch
from torch import Tensor

from attention.yarn import Yarn
from triton_kernels.softmax.rotary import Rotary, rotary_tables, rotate

# Angles of more tokens are not kept.
MOST_KEPT = 8192
# Of the first token: the same for all sequences, or int64 [B].
Start = int | Tensor


def rotary_of(
    start: Start, n_tokens: int, *, rotary_dim: int, base: float, device: torch.device, yarn: Yarn | None = None
) -> Rotary:
    """Cosines and sines of the tokens' angles, one row per token or, of one token each, per sequence."""
    if isinstance(start, Tensor):
        return _tables(start, rotary_dim, base, yarn)
    if n_tokens > MOST_KEPT or torch.compiler.is_compiling():
        return _tables(torch.arange(start, start + n_tokens, device=device), rotary_dim, base, yarn)
    return _stretch(start, n_tokens, rotary_dim, base, device, yarn)


@functools.lru_cache(maxsize=4)
def _stretch(
    start: int, n_tokens: int, rotary_dim: int, base: float, device: torch.device, yarn: Yarn | None
) -> Rotary:
    """Of tokens that follow each other: all layers of a step turn by the same angles, at most of two bases."""
    # What a step without gradients computed may serve one with them.
    with torch.inference_mode(False):
        return _tables(torch.arange(start, start + n_tokens, device=device), rotary_dim, base, yarn)


def _tables(position_T: Tensor, rotary_dim: int, base: float, yarn: Yarn | None) -> Rotary:
    tables = rotary_tables if yarn is None else yarn.tables
    return tables(position_T, rotary_dim=rotary_dim, base=base)


def turned(x_BTHK: Tensor, rotary: Rotary, start: Start) -> Tensor:
    """Queries or keys turned by what `rotary_of` gave."""
    if isinstance(start, Tensor):
        # The sequences stand where the op expects tokens.
        return rotate(x_BTHK.transpose(0, 1), rotary).transpose(0, 1)
    return rotate(x_BTHK, rotary)


def lengths_after(start: Start, batch_size: int, device: torch.device) -> Tensor:
    """Tokens that each sequence has seen when one more has come, int64 [B]."""
    if isinstance(start, Tensor):
        return start + 1
    return torch.full((batch_size,), start + 1, dtype=torch.int64, device=device)
