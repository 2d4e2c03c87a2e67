"""Launch options of the flash decode kernel, and the op's entries for inspect, bench and gpu-check.

Letters: B sequences, S cached tokens, H query heads, G key/value heads, K key width, V value width, C tokens per block of a pool.
"""

from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, launch_table
from triton_kernels.flash_decode import flash_decode

# A latent cache is as wide as its latent and its rotary part together.
MAX_WIDTH = 1024
# Two programs for each of 132 processors.
TARGET_PROGRAMS = 264


SPLIT = launch_table(
    "BLOCK_N",
    {
        (80, 64): [(64, 4, 3)],
        (80, 128): [(64, 4, 3)],
        (80, 256): [(32, 4, 2)],
        (80, 1024): [(16, 4, 1)],
        (100, 64): [(64, 4, 3)],
        (100, 128): [(32, 4, 3)],
        (100, 256): [(32, 4, 2)],
        (100, 1024): [(16, 4, 1)],
    },
)


def _inputs(
    dtype: torch.dtype, device: str, *, B: int, S: int, H: int, G: int, K: int, V: int, C: int = 0, quantised: int = 0, **_: int
) -> dict[str, Any]:
    """Caches in use to different lengths; C > 0 lays them out as a pool in shuffled blocks, `quantised` makes them int8."""
    generator = torch.Generator().manual_seed(0)
    rows = (B, S) if C == 0 else (B * S // C, C)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    arguments: dict[str, Any] = {"q_BHK": draw(B, H, K).to(device, dtype)}
    for name, width in (("k", K), ("v", V)):
        cache = draw(*rows, G, width)
        if quantised:
            scale = cache.abs().amax(-1) / 127
            arguments[f"{name}_scale"] = scale.to(device)
            cache = (cache / scale[..., None]).round().to(torch.int8)
        arguments[f"{name}_cache"] = cache.to(device) if quantised else cache.to(device, dtype)
    arguments["lengths_B"] = torch.tensor([S - 7 * b for b in range(B)]).clamp(min=0).to(device)
    if C:
        arguments["block_table_BN"] = torch.randperm(B * S // C, generator=generator).reshape(B, -1).to(device)
    return arguments


def _cost(element_size: int, *, B: int, S: int, H: int, G: int, K: int, V: int, quantised: int = 0, **_: int) -> tuple[Cost, None]:
    cached = B * S * G * ((K + V) * (1 if quantised else element_size) + (8 if quantised else 0))
    return Cost(flops=2 * B * S * H * (K + V), bytes=cached + element_size * B * H * (K + V)), None


def _operation(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    plain = name == "flash_decode"
    sdpa = {"SDPA": peers.sdpa_decode} if plain else {}
    return Operation(
        name=name,
        call=flash_decode,
        inputs=_inputs,
        cost=_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "B": 16}, {**shape, "S": 65536}),
        cpu_shape={**shape, "S": 4096},
        peers=sdpa | ({"flash-attn": peers.flash_attn_decode} if plain else {}),
        cpu_peers=sdpa,
        # Memory bound: a step's products are a few rows of query heads against keys that are read once.
        without_products=frozenset({"split_kernel", "reduce_kernel"}),
    )


_SHAPE = {"B": 4, "S": 8192, "H": 16, "G": 4, "K": 128, "V": 128}
_LATENT = {**_SHAPE, "G": 1, "K": 576, "V": 512}
OPERATIONS = (
    _operation("flash_decode", _SHAPE, *({**_SHAPE, "B": 3, "S": S, "K": K, "V": K} for S, K in ((257, 128), (1000, 64), (300, 256)))),
    _operation("flash_decode/paged", {**_SHAPE, "C": 64}, {**_SHAPE, "S": 320, "C": 64}, {**_SHAPE, "S": 256, "C": 16}),
    _operation("flash_decode/int8", {**_SHAPE, "quantised": 1}, {**_SHAPE, "S": 257, "quantised": 1}),
    _operation("flash_decode/latent", _LATENT, {**_LATENT, "S": 300}),
)
