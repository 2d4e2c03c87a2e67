"""What the launches of one delta-rule call have in common: sizes, strides, grids and options.

Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width, S sequences, C chunk length.
"""

from typing import Any

import torch

from triton_kernels.configurations import LaunchOptions, Tables

Tensor = torch.Tensor

# A scan should keep every multiprocessor of an H200 busy.
MIN_PROGRAMS = 132
CHUNK_SIZES = (16, 32, 64)
# fp32 products run on the plain multipliers, which take their operands from registers: longer chunks spill.
SINGLE_CHUNK = 16
MAX_WIDTH = 128


def check_triton_call(op: str, q_BTGK: Tensor, v_BTHV: Tensor, chunk_size: int) -> None:
    """What only the Triton kernels refuse."""
    width = max(q_BTGK.shape[3], v_BTHV.shape[3])
    if width > MAX_WIDTH or q_BTGK.dtype == torch.float64:
        raise ValueError(f"{op}: {q_BTGK.dtype} heads of width {width}; the Triton kernels take float32, float16 and bfloat16 up to {MAX_WIDTH}")
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"{op}: chunk_size={chunk_size}; the Triton kernels take {CHUNK_SIZES}")


def addressable(x: Tensor) -> Tensor:
    """A tensor [B, T, H] or [B, T, H, D] whose batch rows follow one another and whose axis D is dense; copied only where it is not."""
    return x if (x.dim() == 3 or x.stride(3) == 1) and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least one that is not smaller than n."""
    return 1 << max(0, n - 1).bit_length()


def block_of(width: int) -> int:
    """The power of two that holds a head width; 16 is the least a product takes."""
    return max(16, power_of_two(width))


class DeltaCall:
    """q [B, T, G, K] and v [B, T, H, V] decide everything; chunks lie in slots as `delta_tiles.py` says."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int):
        (self.B, self.T, self.H, self.V), (self.G, self.K) = v.shape, q.shape[2:]
        self.chunk = chunk_size
        self.S = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.n_chunks = cdiv(self.T, chunk_size)
        self.slots = self.B * self.n_chunks if cu_seqlens is None else self.T // chunk_size + self.S
        self.empty = v.numel() == 0
        self.width = max(self.K, self.V)
        # fp32 stands for itself; the tables' options are for 2-byte elements, and fp32 tiles need twice the room.
        self.is_single = q.dtype == torch.float32
        self.precision = {"PRECISION": "ieee" if self.is_single else "tf32"}
        self.common: dict[str, Any] = {"CHUNK": chunk_size, "GROUP": self.H // self.G, "PACKED": cu_seqlens is not None, "K": self.K}
        self.common |= {"BLOCK_K": block_of(self.K)} | self.precision
        self.chunk_constants = self.common | {"BLOCK_S": power_of_two(self.S)}
        self.scan_sizes = (self.T, self.B * self.T, self.n_chunks, self.slots, self.H)

    def options(self, tables: Tables) -> tuple[LaunchOptions, ...]:
        return tables[self.is_single].options(self.width)

    def chunk_launch(self, tables: Tables, heads: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of a kernel with one program per slot and head."""
        options = self.options(tables)[0]
        return (self.slots * heads,), self.chunk_constants | dict(options.blocks) | warps_and_stages(options)

    def scan_launch(self, tables: Tables, roles: int) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and options of a scan: the widest slices that still fill the device; if none does, the narrowest."""
        programs, options = 0, None
        for options in self.options(tables):
            programs = self.S * self.H * roles * cdiv(self.V, options.blocks["BLOCK"])
            if programs >= MIN_PROGRAMS:
                break
        assert options is not None
        return (programs,), self.common | {"V": self.V} | dict(options.blocks) | warps_and_stages(options)

    def sum_groups(self, grad_BTHK: Tensor) -> Tensor:
        """[B, T, G, K]: the gradient of q or k, summed over the value heads that share it."""
        return grad_BTHK if self.H == self.G else grad_BTHK.unflatten(2, (self.G, -1)).sum(3)


def warps_and_stages(options: LaunchOptions) -> dict[str, int]:
    return {"num_warps": options.num_warps, "num_stages": options.num_stages}


def token_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """(stride of a token, stride of a head) of each tensor."""
    return tuple(s for x in tensors for s in ((0, 0) if x is None else (x.stride(1), x.stride(2))))
