"""Block sizes of the flash attention kernels, and the op's entries for inspect, bench and gpu-check.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K key width, V value width.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, Tables, launch_table, random_inputs
from triton_kernels.flash_attention import flash_attention
from triton_kernels.rotary import rotary_tables

# Three tables each: for 2-byte elements, for fp32, and for 2-byte elements where a few more registers are needed: in packed sequences,
# with rotary queries, and at lengths that are no multiple of 16.
BLOCKS = "BLOCK_M BLOCK_N"
# fp32 products run on the plain multipliers: small blocks, one table for every architecture.
SINGLE = launch_table(BLOCKS, {(80, 64): [(32, 32, 8, 1)], (80, 128): [(16, 16, 8, 1)], (80, 256): [(16, 16, 8, 1)]})

FORWARD_LINES = {
    (80, 64): [(64, 64, 4, 3)],
    (80, 128): [(128, 32, 8, 3)],
    (80, 256): [(64, 32, 8, 2)],
    (90, 64): [(128, 128, 8, 3)],
    (90, 128): [(128, 64, 8, 3)],
    (90, 256): [(64, 64, 8, 2)],
    (100, 64): [(128, 64, 8, 3)],
    (100, 128): [(128, 64, 8, 3)],
    (100, 256): [(64, 64, 8, 2)],
}
QUERY_GRADIENT_LINES = {
    (80, 64): [(64, 64, 4, 3)],
    (80, 128): [(64, 64, 8, 2)],
    (80, 256): [(64, 32, 8, 1)],
    (90, 64): [(128, 64, 8, 3)],
    (90, 128): [(64, 64, 4, 2)],
    (90, 256): [(64, 32, 8, 2)],
    (100, 64): [(64, 64, 4, 2)],
    (100, 128): [(64, 64, 4, 2)],
    (100, 256): [(64, 32, 8, 2)],
}
KEY_VALUE_GRADIENT_LINES = {
    (80, 64): [(32, 64, 4, 2)],
    (80, 128): [(32, 64, 8, 2)],
    (80, 256): [(16, 64, 8, 2)],
    (90, 64): [(64, 128, 8, 2)],
    (90, 128): [(32, 64, 4, 2)],
    (90, 256): [(16, 64, 8, 2)],
}


def _tables(lines: dict[tuple[int, int], list[tuple[int, ...]]], packed: dict[tuple[int, int], list[tuple[int, ...]]] | None = None) -> Tables:
    """`packed`: the lines that differ in the third table."""
    table = launch_table(BLOCKS, lines)
    return table, SINGLE, launch_table(BLOCKS, lines | packed) if packed else table


FORWARD = _tables(FORWARD_LINES, packed={(90, 256): [(64, 32, 8, 2)]})
QUERY_GRADIENT = _tables(QUERY_GRADIENT_LINES, packed={(90, 128): [(64, 32, 4, 3)], (100, 128): [(64, 32, 4, 3)]})
KEY_VALUE_GRADIENT = _tables(KEY_VALUE_GRADIENT_LINES, packed={(90, 128): [(32, 64, 8, 2)]})


def _inputs(
    dtype: torch.dtype, device: str, *, B: int, T: int, H: int, G: int, K: int, V: int, sinks: int = 0, sequences: int = 0, P: int = 0, **_: int
) -> dict[str, Any]:
    """sinks: one logit per head; sequences: T is cut into so many, the first one empty; P: rotary channels of the queries."""
    shapes = {"q_BTHK": (B, T, H, K), "k_BSGK": (B, T, G, K), "v_BSGV": (B, T, G, V)} | ({"sinks_H": (H,)} if sinks else {})
    inputs: dict[str, Any] = {**random_inputs(0, dtype, device, shapes)}
    if sequences:
        inputs["cu_seqlens"] = torch.tensor([0, *(T * n // (sequences - 1) for n in range(sequences))]).to(device)
    if P:
        inputs["rotary"] = tuple(table.float() for table in rotary_tables(torch.arange(T, device=device), rotary_dim=P, base=10_000.0))
    return inputs


def _cost(element_size: int, *, B: int, T: int, H: int, G: int, K: int, V: int, W: int = 0, sequences: int = 0, **_: int) -> tuple[Cost, Cost]:
    """Visible pairs only: a product of the forward or backward costs 2 K (or 2 V) per pair. Saved statistics are fp32, one per query and head."""
    n_runs = max(1, sequences - 1)
    length = T // n_runs
    window = min(W or length, length)
    pairs = B * H * n_runs * (window * (window + 1) // 2 + (length - window) * window)
    queries, keys = B * T * H, B * T * G
    forward_bytes = element_size * (queries + keys) * (K + V) + 4 * queries
    backward_bytes = element_size * (queries * (2 * K + 2 * V) + keys * 2 * (K + V)) + 4 * queries
    return Cost(flops=2 * pairs * (K + V), bytes=forward_bytes), Cost(flops=2 * pairs * (3 * K + 2 * V), bytes=backward_bytes)


def _operation(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    window = shape.get("W")
    plain = not {"sinks", "sequences", "P"} & shape.keys()
    others: dict[str, Any] = {"fla": partial(peers.fla_attention, window=window)}
    if plain:
        others |= {"flash-attn": partial(peers.flash_attn, window=window), "xformers": partial(peers.xformers_attention, window=window)}
        others |= {"FlexAttention": peers.flex_attention(window)}
    if plain and window is None:
        others |= {"SDPA cuDNN": peers.sdpa("CUDNN_ATTENTION"), "SDPA flash": peers.sdpa("FLASH_ATTENTION")}
    return Operation(
        name=name,
        call=partial(flash_attention, window=window),
        inputs=_inputs,
        cost=_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "B": 4}, {**shape, "T": 16384}) if plain else (shape,),
        cpu_shape={**shape, "T": 2048, "H": 8, "G": max(1, shape["G"] // 2), "K": 64, "V": 64},
        peers=others,
        cpu_peers={"dense formula": peers.dense_attention, "SDPA": peers.sdpa(None)} if window is None and plain else {},
    )


def _heads(T: int, K: int, V: int, H: int = 4, G: int = 2, **more: int) -> dict[str, int]:
    return {"B": 2, "T": T, "H": H, "G": G, "K": K, "V": V, **more}


def _inspected(H: int, G: int, K: int, **more: int) -> dict[str, int]:
    return {"B": 1, "T": 4096, "H": H, "G": G, "K": K, "V": K, **more}


OPERATIONS = (
    _operation(
        "flash_attention",
        _inspected(16, 16, 128),
        *(_heads(1, 64, 64), _heads(63, 32, 32), _heads(257, 64, 64), _heads(1000, 128, 128, H=3, G=3), _heads(300, 256, 256), _heads(304, 192, 128)),
    ),
    _operation("flash_attention/grouped", _inspected(16, 2, 128), _heads(257, 128, 128, H=16), _heads(112, 64, 64)),
    _operation(
        "flash_attention/window",
        _inspected(16, 4, 128, W=1024),
        *(_heads(1008, 128, 128, W=1024), _heads(1000, 64, 64, W=1024), _heads(1500, 128, 128, W=1024), _heads(1300, 256, 256, W=1024)),
    ),
    _operation("flash_attention/sinks", _inspected(16, 4, 128, W=1024, sinks=1), _heads(257, 128, 128, sinks=1), _heads(1500, 64, 64, sinks=1)),
    _operation(
        "flash_attention/packed",
        _inspected(16, 4, 128, sequences=5),
        *({**_heads(T, K, K, sequences=n), "B": 1} for T, K, n in ((257, 128, 5), (1000, 64, 9), (300, 256, 4))),
    ),
    _operation(
        "flash_attention/rotary",
        _inspected(16, 4, 128, P=128),
        *(_heads(257, 128, 128, P=128), _heads(100, 64, 64, P=32), _heads(300, 256, 256, P=256), _heads(63, 48, 48, P=24)),
    ),
    _operation("flash_attention/width_64", _inspected(16, 16, 64), _heads(257, 64, 64)),
    _operation("flash_attention/width_256", _inspected(8, 8, 256), _heads(257, 256, 256)),
)
