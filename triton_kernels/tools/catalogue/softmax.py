"""flash_attention and flash_decode as inspect, bench and gpu-check know them.

Legend: B batch, T queries, S keys or cached tokens, H query heads, G key/value heads, K key width, V value width, W
window, P rotated channels, C tokens per block of a pool.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode
from triton_kernels.softmax.rotary import rotary_tables
from triton_kernels.tools import peers
from triton_kernels.tools.operations import Cost, Operation, packed_offsets, random_inputs


def _inputs(
    dtype: torch.dtype, device: str, *, sinks: int = 0, sequences: int = 0, P: int = 0, **sizes: int
) -> dict[str, Any]:
    """sinks: one logit per head; sequences: T is cut into so many; P: rotary channels of the queries."""
    T = sizes["T"]
    names = ("q_BTHK", "k_BSGK", "v_BSGV", "sinks_H")[: 4 if sinks else 3]
    inputs: dict[str, Any] = {**random_inputs(0, dtype, device, {**sizes, "S": T}, *names)}
    if sequences:
        inputs["cu_seqlens"] = packed_offsets(T, sequences, device)
    if P:
        inputs["rotary"] = tuple(
            table.float() for table in rotary_tables(torch.arange(T, device=device), rotary_dim=P, base=10_000.0)
        )
    return inputs


def attention_cost(
    element_size: int, *, B: int, T: int, H: int, G: int, K: int, V: int, W: int = 0, sequences: int = 0, **_: int
) -> tuple[Cost, Cost]:
    """Visible pairs only: a product of the forward or backward costs 2 K (or 2 V) per pair. Saved statistics are fp32,
    one per query and head."""
    n_runs = max(1, sequences - 1)
    length = T // n_runs
    window = min(W or length, length)
    pairs = B * H * n_runs * (window * (window + 1) // 2 + (length - window) * window)
    queries, keys = B * T * H, B * T * G
    forward_bytes = element_size * (queries + keys) * (K + V) + 4 * queries
    backward_bytes = element_size * (queries * (2 * K + 2 * V) + keys * 2 * (K + V)) + 4 * queries
    return Cost(flops=2 * pairs * (K + V), bytes=forward_bytes), Cost(
        flops=2 * pairs * (3 * K + 2 * V), bytes=backward_bytes
    )


def _attention(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    window = shape.get("W")
    plain = not {"sinks", "sequences", "P"} & shape.keys()
    others: dict[str, Any] = {"fla": partial(peers.fla_attention, window=window)}
    if plain:
        others |= {
            "flash-attn": partial(peers.flash_attn, window=window),
            "xformers": partial(peers.xformers_attention, window=window),
        }
        others |= {"FlexAttention": peers.flex_attention(window)}
    if plain and window is None:
        others |= {"SDPA cuDNN": peers.sdpa("CUDNN_ATTENTION"), "SDPA flash": peers.sdpa("FLASH_ATTENTION")}
    return Operation(
        name=name,
        call=partial(flash_attention, window=window),
        inputs=_inputs,
        cost=attention_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        # Few heads where the sequence is long: the check before the timing holds all scores in fp64.
        bench_shapes=(
            shape,
            {**shape, "B": 4},
            {**shape, "T": 16384, "H": shape["H"] // 4, "G": max(1, shape["G"] // 4)},
        )
        if plain
        else (shape,),
        cpu_shapes=(
            {**shape, "T": 2048, "H": 8, "G": max(1, shape["G"] // 2), "K": 64, "V": 64}
            | ({"P": 64} if "P" in shape else {}),
        ),
        peers=others,
        without_products=frozenset({"rotate_kernel"}),
        cpu_peers={"dense formula": peers.dense_attention, "SDPA": peers.sdpa(None)}
        if window is None and plain
        else {},
    )


def _heads(T: int, K: int, V: int, H: int = 4, G: int = 2, **more: int) -> dict[str, int]:
    return {"B": 2, "T": T, "H": H, "G": G, "K": K, "V": V, **more}


def _inspected(H: int, G: int, K: int, **more: int) -> dict[str, int]:
    return {"B": 1, "T": 4096, "H": H, "G": G, "K": K, "V": K, **more}


def _decode_inputs(
    dtype: torch.dtype, device: str, *, B: int, S: int, G: int, C: int = 0, quantised: int = 0, **sizes: int
) -> dict[str, Any]:
    """Caches in use to different lengths; C > 0 lays them out as a pool in shuffled blocks, `quantised` makes them
    int8."""
    rows = {"B": B, "S": S} if C == 0 else {"B": B * S // C, "S": C}
    caches = random_inputs(1, torch.float32, "cpu", {**sizes, **rows, "G": G}, "k_BSGK", "v_BSGV")
    arguments: dict[str, Any] = {"q_BHK": random_inputs(0, dtype, device, {**sizes, "B": B}, "q_BHK")["q_BHK"].detach()}
    for name, cache in (("k", caches["k_BSGK"].detach()), ("v", caches["v_BSGV"].detach())):
        if quantised:
            scale = cache.abs().amax(-1) / 127
            arguments[f"{name}_scale"] = scale.to(device)
            cache = (cache / scale[..., None]).round().to(torch.int8)
        arguments[f"{name}_cache"] = cache.to(device) if quantised else cache.to(device, dtype)
    arguments["lengths_B"] = torch.tensor([S - 7 * b for b in range(B)]).clamp(min=0).to(device)
    if C:
        arguments["block_table_BN"] = (
            torch.randperm(B * S // C, generator=torch.Generator().manual_seed(0)).reshape(B, -1).to(device)
        )
    return arguments


def _decode_cost(
    element_size: int, *, B: int, S: int, H: int, G: int, K: int, V: int, quantised: int = 0, **_: int
) -> tuple[Cost, None]:
    cached = B * S * G * ((K + V) * (1 if quantised else element_size) + (8 if quantised else 0))
    return Cost(flops=2 * B * S * H * (K + V), bytes=cached + element_size * B * H * (K + V)), None


def _decode(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    plain = name == "flash_decode"
    sdpa = {"SDPA": peers.sdpa_decode} if plain else {}
    return Operation(
        name=name,
        call=flash_decode,
        inputs=_decode_inputs,
        cost=_decode_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "B": 16}, {**shape, "S": 65536}),
        cpu_shapes=({**shape, "S": 4096},),
        peers=sdpa | ({"flash-attn": peers.flash_attn_decode} if plain else {}),
        cpu_peers=sdpa,
        # Memory bound: a step's products are a few rows of query heads against keys that are read once.
        without_products=frozenset({"decode_kernel"}),
    )


DECODE = {"B": 4, "S": 8192, "H": 16, "G": 4, "K": 128, "V": 128}
LATENT = {**DECODE, "G": 1, "K": 576, "V": 512}
OPERATIONS = (
    _attention(
        "flash_attention",
        _inspected(16, 16, 128),
        *(
            _heads(1, 64, 64),
            _heads(63, 32, 32),
            _heads(257, 64, 64),
            _heads(1000, 128, 128, H=3, G=3),
            _heads(300, 256, 256),
            _heads(304, 192, 128),
        ),
    ),
    _attention("flash_attention/grouped", _inspected(16, 2, 128), _heads(257, 128, 128, H=16), _heads(112, 64, 64)),
    _attention(
        "flash_attention/window",
        _inspected(16, 4, 128, W=1024),
        *(_heads(T, K, K, W=1024) for T, K in ((1008, 128), (1000, 64), (1500, 128), (1300, 256))),
    ),
    _attention(
        "flash_attention/sinks",
        _inspected(16, 4, 128, W=1024, sinks=1),
        _heads(257, 128, 128, sinks=1),
        _heads(1500, 64, 64, sinks=1),
    ),
    _attention(
        "flash_attention/packed",
        _inspected(16, 4, 128, sequences=5),
        *({**_heads(T, K, K, sequences=n), "B": 1} for T, K, n in ((257, 128, 5), (1000, 64, 9), (300, 256, 4))),
    ),
    _attention(
        "flash_attention/rotary",
        _inspected(16, 4, 128, P=128),
        *(_heads(T, K, K, P=P) for T, K, P in ((257, 128, 128), (100, 64, 32), (300, 256, 256), (63, 48, 24))),
    ),
    _attention(
        "flash_attention/every_option",
        _inspected(16, 4, 96, W=1024, sinks=1, sequences=5, P=96),
        {**_heads(1500, 96, 96, W=1024, sinks=1, sequences=4, P=48), "B": 1},
    ),
    _attention("flash_attention/width_64", _inspected(16, 16, 64), _heads(257, 64, 64)),
    _attention("flash_attention/width_256", _inspected(8, 8, 256), _heads(257, 256, 256)),
    _decode(
        "flash_decode",
        DECODE,
        *({**DECODE, "B": 3, "S": S, "K": K, "V": K} for S, K in ((257, 128), (1000, 64), (300, 256))),
    ),
    _decode("flash_decode/paged", {**DECODE, "C": 64}, {**DECODE, "S": 320, "C": 64}, {**DECODE, "S": 256, "C": 16}),
    _decode("flash_decode/int8", {**DECODE, "quantised": 1}, {**DECODE, "S": 257, "quantised": 1}),
    _decode("flash_decode/latent", LATENT, {**LATENT, "S": 300}),
)
