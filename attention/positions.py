"""Where the tokens of a call stand: one place for all sequences, or, in a cache whose sequences have seen different
numbers of tokens, one token of each at a place of its own.

Legend: B batch, T tokens, H heads, K head width.
"""

import torch
from torch import Tensor

from attention.yarn import Yarn
from triton_kernels.softmax.rotary import Rotary, rotary_tables, rotate

# Of the first token: the same for all sequences, or int64 [B].
Start = int | Tensor


def rotary_of(
    start: Start, n_tokens: int, *, rotary_dim: int, base: float, device: torch.device, yarn: Yarn | None = None
) -> Rotary:
    """Cosines and sines of the tokens' angles, one row per token or, of one token each, per sequence."""
    position = start if isinstance(start, Tensor) else torch.arange(start, start + n_tokens, device=device)
    tables = rotary_tables if yarn is None else yarn.tables
    return tables(position, rotary_dim=rotary_dim, base=base)


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
