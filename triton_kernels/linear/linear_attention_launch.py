"""What the launchers of linear attention share: how a tensor is walked, the sizes of a call, and when a sequence is cut
into segments.

Legend: B batch, T tokens, G query/key heads, H (value) heads, K key width, V value width, S sequences, C chunk length.
"""

import torch
from torch import Tensor

from triton_kernels.common.launch_tables import LaunchOptions
from triton_kernels.common.layout import in_one_piece
from triton_kernels.common.sizes import cdiv, padded, power_of_two

# A launch should keep every multiprocessor of an H200 busy.
MIN_PROGRAMS = 132


def addressable(x: Tensor) -> Tensor:
    """A tensor [B, T, H] or [B, T, H, D] whose batch rows follow one another and whose axis D is dense; copied only
    where it is not."""
    return (
        x
        if (x.dim() == 3 or x.stride(3) == 1) and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
        else in_one_piece(x)
    )


def token_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """(stride of a token, stride of a head) of each tensor."""
    return tuple(s for x in tensors for s in ((0, 0) if x is None else (x.stride(1), x.stride(2))))


def choose_segments(programs: int, n_chunks: int, fold: float) -> int:
    """Into how many segments a scan is cut that takes n_chunks steps and has so many programs.

    Two passes run over n segments: both chains are n_chunks / n steps long, and `fold` is what starting from one more
    segment costs, in steps. As many as fill the device twice, and no more than make that shortest. Two win nothing, so
    a cut has to shorten the chain by a fifth, the second launch, as long as four steps, included.
    """
    segments = MIN_PROGRAMS // max(1, programs) + 1
    while fold * segments**2 > 2 * max(1, n_chunks):
        segments -= 1
    return (
        segments if segments > 1 and 2 * cdiv(n_chunks, segments) + fold * (segments - 1) + 4 <= 0.8 * n_chunks else 1
    )


class LinearCall:
    """Sizes of a call; q [B, T, G, K] and v [B, T, H, V] decide everything."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None):
        (self.B, self.T, self.H, self.V), (self.G, self.K) = v.shape, q.shape[2:]
        self.S = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.is_packed, self.block_s, self.block_k = cu_seqlens is not None, power_of_two(self.S), padded(self.K)
        self.head_rows = self.S * self.H
        self.width = max(self.K, self.V)
        # The tables' first lines are for 2-byte elements: fp32 tiles need twice the room, and their products run on the
        # plain multipliers.
        self.is_single = q.dtype == torch.float32
        self.precision = "ieee" if self.is_single else "tf32"

    def slots(self, n_tokens: int) -> int:
        """Pieces of n_tokens, as `tiles.py` numbers them."""
        return self.T // n_tokens + self.S if self.is_packed else self.B * cdiv(self.T, n_tokens)

    def chunks(self, chunk_size: int) -> int:
        """Of a sequence, in the mean."""
        return cdiv(self.B * self.T, max(1, self.S) * chunk_size)

    def widest_slices(
        self, table: tuple[LaunchOptions, ...], *, of_k: int, of_v: int, segments: int = 1
    ) -> tuple[LaunchOptions, int]:
        """The options with the widest slices of the state that still fill the device, or with the narrowest if none do,
        and how many slices a head has: so many times those of the key width and those of the value width."""
        options, slices = table[0], 0
        for options in table:
            slices = of_k * cdiv(self.K, options.blocks["BLOCK"]) + of_v * cdiv(self.V, options.blocks["BLOCK"])
            if self.head_rows * segments * slices >= MIN_PROGRAMS:
                break
        return options, slices
