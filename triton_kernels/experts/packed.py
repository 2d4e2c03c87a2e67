"""Experts of packed weights in C on a CPU, for the few tokens of a decode step; `moe/packed.py` says how they are
packed.

Legend: E experts, I inputs, O outputs, T tokens, D model width, N assigned rows.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from triton_kernels.native import library
from triton_kernels.native.library import call, is_native, threads, wide


class Packed(Protocol):
    """A weight [E, I, O]: see `moe.packed.PackedMatrices`."""

    codes: Tensor
    scale: Tensor | None
    offset: Tensor | None
    shape: tuple[int, int, int]


class Rows(Protocol):
    """See `routing.assignments.Assignments`."""

    @property
    def token_N(self) -> Tensor: ...
    @property
    def weight_N(self) -> Tensor: ...
    @property
    def expert_offsets(self) -> Tensor: ...
    @property
    def token_offsets(self) -> Tensor: ...
    @property
    def row_of_slot_N(self) -> Tensor: ...


def takes_packed(codes: Tensor, x_TD: Tensor | None = None) -> bool:
    """Whether the forms in C take these codes, and few tokens x_TD where they are given."""
    here = codes.device.type == "cpu" and codes.is_contiguous() and library.native().library is not None
    if x_TD is None:
        return here and not torch.compiler.is_compiling()
    return here and is_native(x_TD, len(x_TD))


def packed_experts_native(x_TD: Tensor, gate_up: Packed, down: Packed, rows: Rows, *, bits: int, group: int) -> Tensor:
    """y_TD of few tokens in x's dtype, computed in fp32; what `takes_packed` lets pass.

    Raises:
        ValueError: for rows that no sort made.
    """
    (T, D), (E, F, _) = x_TD.shape, down.shape
    y_TD = torch.empty(T, D)
    call(
        "packed_experts",
        *(wide(x_TD), gate_up.codes, gate_up.scale, gate_up.offset, down.codes, down.scale, down.offset),
        *(rows.token_N.contiguous(), wide(rows.weight_N), rows.expert_offsets.contiguous()),
        *(rows.token_offsets.contiguous(), rows.row_of_slot_N.contiguous(), y_TD),
        *(T, len(rows.token_N), E, D, F, bits, group, threads()),
    )
    return y_TD.to(x_TD.dtype)


def unpack_native(weight: Packed, experts: Sequence[int], *, bits: int, group: int) -> Tensor:
    """The weights of some experts in fp32, [len(experts), I, O]."""
    _, n_in, n_out = weight.shape
    w_EIO = torch.empty(len(experts), n_in, n_out)
    for w_IO, e in zip(w_EIO, experts):
        call("unpack_weight", weight.codes, weight.scale, weight.offset, w_IO, e, n_in, n_out, bits, group)
    return w_EIO
