"""Block sizes of the attention kernels (flash_attention, flash_decode, mixed_attention), and the ops' entries for
inspect, bench and gpu-check.

Letters: B batch, T queries, S keys or cached tokens, H query heads, G key/value heads, J linear heads, K key width, V
value width, W window, P rotated channels, C tokens per block of a pool, X channels of the linear heads' queries, keys
and values side by side.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, Tables, launch_table, operations, random_inputs
from triton_kernels.decayed_linear_attention import decayed_linear_attention
from triton_kernels.flash_attention import flash_attention
from triton_kernels.flash_decode import flash_decode
from triton_kernels.mixed_attention import mixed_attention, mixed_decode
from triton_kernels.rotary import rotary_tables

WIDTHS = (64, 128, 256)
# Three tables each: for 2-byte elements, for fp32, and for 2-byte elements where a few more registers are needed: in
# packed sequences, with rotary queries, and at lengths that are no multiple of 16.
BLOCKS = partial(launch_table, "BLOCK_M BLOCK_N", WIDTHS)
# fp32 products run on the plain multipliers: small blocks, one row for every architecture.
SINGLE = BLOCKS(sm_80=[(32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)])
FORWARD_80 = [(64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 8, 2)]
FORWARD_100 = [(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)]
FORWARD: Tables = (
    BLOCKS(sm_80=FORWARD_80, sm_90=[(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)], sm_100=FORWARD_100),
    SINGLE,
    BLOCKS(sm_80=FORWARD_80, sm_90=[(128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)], sm_100=FORWARD_100),
)
QUERY_80 = [(64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 1)]
QUERY_GRADIENT: Tables = (
    BLOCKS(
        sm_80=QUERY_80,
        sm_90=[(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
        sm_100=[(64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)],
    ),
    SINGLE,
    BLOCKS(
        sm_80=QUERY_80,
        sm_90=[(128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 8, 2)],
        sm_100=[(64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2)],
    ),
)
KEY_VALUE_80 = [(32, 64, 4, 2), (32, 64, 8, 2), (16, 64, 8, 2)]
KEY_VALUE_GRADIENT: Tables = (
    BLOCKS(sm_80=KEY_VALUE_80, sm_90=[(64, 128, 8, 2), (32, 64, 4, 2), (16, 64, 8, 2)]),
    SINGLE,
    BLOCKS(sm_80=KEY_VALUE_80, sm_90=[(64, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)]),
)

# The common launch. Small blocks of queries: two programs then share a processor, so that a scan, which waits for
# memory, has a block of queries beside it. fp32 as above.
MIXED_BLOCKS = partial(launch_table, "BLOCK_M BLOCK_N BLOCK CHUNK", WIDTHS)
MIXED_FORWARD: Tables = (
    MIXED_BLOCKS(
        sm_80=[(64, 64, 32, 64, 4, 2), (64, 32, 32, 32, 4, 3), (64, 32, 16, 16, 8, 2)],
        sm_90=[(64, 64, 32, 64, 4, 3), (64, 64, 32, 64, 4, 2), (64, 32, 16, 16, 8, 2)],
        sm_100=[(64, 64, 32, 64, 8, 2), (64, 64, 16, 64, 4, 2), (64, 64, 16, 64, 8, 2)],
    ),
    MIXED_BLOCKS(sm_80=[(32, 32, 16, 16, 8, 1), (16, 16, 16, 16, 8, 1), (16, 16, 16, 16, 8, 1)]),
)

# Decoding: two programs for each of 132 processors, and what counts those that have finished (see `split_counters`) by
# device and stream. A CPU's are for the interpreter and the offline tools.
TARGET_PROGRAMS = 264
COUNTERS = {(torch.device("cpu"), 0): torch.zeros(TARGET_PROGRAMS, dtype=torch.int32)}
WIDTHS = (64, 128, 256, 1024)
SPLIT: Tables = (
    launch_table(
        "BLOCK_N",
        WIDTHS,
        sm_80=[(64, 4, 3), (64, 4, 3), (32, 4, 2), (16, 4, 1)],
        sm_100=[(64, 4, 3), (32, 4, 3), (32, 4, 2), (16, 4, 1)],
    ),
    launch_table("BLOCK_N", WIDTHS, sm_80=[(32, 4, 2), (32, 8, 1), (16, 8, 2), (16, 16, 1)]),
)


def _offsets(T: int, sequences: int, device: str) -> Tensor:
    """Offsets of so many sequences in T tokens, the first one empty."""
    return torch.tensor([0, *(T * n // (sequences - 1) for n in range(sequences))]).to(device)


def _inputs(
    dtype: torch.dtype, device: str, *, sinks: int = 0, sequences: int = 0, P: int = 0, **sizes: int
) -> dict[str, Any]:
    """sinks: one logit per head; sequences: T is cut into so many; P: rotary channels of the queries."""
    T = sizes["T"]
    names = ("q_BTHK", "k_BSGK", "v_BSGV", "sinks_H")[: 4 if sinks else 3]
    inputs: dict[str, Any] = {**random_inputs(0, dtype, device, {**sizes, "S": T}, *names)}
    if sequences:
        inputs["cu_seqlens"] = _offsets(T, sequences, device)
    if P:
        inputs["rotary"] = tuple(
            table.float() for table in rotary_tables(torch.arange(T, device=device), rotary_dim=P, base=10_000.0)
        )
    return inputs


def _cost(
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
        cost=_cost,
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


def _mixed_inputs(dtype: torch.dtype, device: str, *, W: int = 0, sequences: int = 0, **sizes: int) -> dict[str, Any]:
    """A window of W; `sequences`: T is cut into so many, and every token has a decay of its own. All heads are K
    wide."""
    T, J, K = sizes["T"], sizes["J"], sizes["K"]
    names = ("q_BTHK", "k_BSGK", "v_BSGV", "linear_q_BTJK", "linear_k_BTJK", "linear_v_BTJV")
    inputs: dict[str, Any] = dict(random_inputs(T, dtype, device, {**sizes, "S": T, "V": K}, *names))
    if sequences:
        inputs["log_decay"] = (
            -random_inputs(T + 1, torch.float32, device, sizes, "gate_BTJ")["gate_BTJ"].detach().abs().requires_grad_()
        )
        inputs["cu_seqlens"] = _offsets(T, sequences, device)
    else:
        inputs["log_decay"] = _slopes(J, device)
    return {**inputs, "window": W or None, "linear_scale": K**-0.5}


def _slopes(J: int, device: str) -> Tensor:
    return -(2.0 ** (-8 * (torch.arange(J, device=device) + 1) / J))


def _mixed_cost(
    element_size: int, *, B: int, T: int, H: int, G: int, J: int, K: int, W: int = 0, sequences: int = 0
) -> tuple[Cost, Cost]:
    """The two ops' costs, added."""
    softmax_costs = _cost(element_size, B=B, T=T, H=H, G=G, K=K, V=K, W=W, sequences=sequences)
    linear = operations()["decayed_linear_attention/" + ("token" if sequences else "fixed")]
    linear_costs: Any = linear.cost(element_size, B=B, T=T, H=J, K=K, V=K)
    forward, backward = (
        Cost(flops=a.flops + b.flops, bytes=a.bytes + b.bytes) for a, b in zip(softmax_costs, linear_costs)
    )
    return forward, backward


def mixed_heads(**inputs: Any) -> Tensor:
    """mixed_attention of both kinds of heads side by side, as a layer hands them to its output projection."""
    o_BTHV, linear_o_BTJV, _ = mixed_attention(**inputs)
    return torch.cat((o_BTHV.flatten(2), linear_o_BTJV.flatten(2)), -1)


def separate_launches(
    *, window: int | None, linear_scale: float, log_decay: Tensor, cu_seqlens: Tensor | None = None, **inputs: Tensor
) -> Tensor:
    """Our own two ops, one after the other: what the common launch has to beat."""
    q, k, v, *linear_inputs = inputs.values()
    o_BTHV = flash_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)
    linear_o_BTJV, _ = decayed_linear_attention(*linear_inputs, log_decay, scale=linear_scale, cu_seqlens=cu_seqlens)
    return torch.cat((o_BTHV.flatten(2), linear_o_BTJV.flatten(2)), -1)


def _mixed(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    return Operation(
        name=name,
        call=mixed_heads,
        inputs=_mixed_inputs,
        cost=_mixed_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "T": 8192}),
        cpu_shapes=({**shape, "T": 2048, "H": 4, "G": 2, "J": 4, "K": 64},),
        peers={"separate launches": separate_launches},
        without_products=frozenset({"gate_gradient_kernel"}),
    )


def _mixed_decode_inputs(dtype: torch.dtype, device: str, **sizes: int) -> dict[str, Any]:
    """Caches in use to different lengths, the last one gone round."""
    B, S, J, K = (sizes[letter] for letter in "BSJK")
    sizes |= {"V": K, "X": 3 * J * K}
    inputs = random_inputs(S, dtype, device, sizes, "q_BHK", "k_cache_BSGK", "v_cache_BSGV", "linear_qkv_BX")
    inputs |= random_inputs(S + 1, torch.float32, device, sizes, "state_BJKV")
    lengths_B = torch.tensor([max(0, S + 5 - 7 * b) for b in reversed(range(B))]).to(device)
    return {name: x.detach() for name, x in inputs.items()} | {
        "lengths_B": lengths_B,
        "log_decay_J": _slopes(J, device),
    }


def _mixed_decode_cost(element_size: int, *, B: int, S: int, H: int, G: int, J: int, K: int) -> tuple[Cost, None]:
    """The caches read, the states read and written, what goes in and out of the heads."""
    cached, states, ends = 2 * B * S * G * K, B * J * K * K, 2 * B * K * (H + 2 * J)
    return Cost(flops=4 * B * S * H * K + 5 * states, bytes=element_size * (cached + ends) + 8 * states), None


def decode_with_state(**inputs: Any) -> tuple[Tensor, ...]:
    """The outputs, and the state that was updated in place: gpu-check compares all of them."""
    return *mixed_decode(**inputs), inputs["state_BJKV"]


DECODE = {"B": 4, "S": 8192, "H": 16, "G": 4, "K": 128, "V": 128}
LATENT = {**DECODE, "G": 1, "K": 576, "V": 512}
MIXED = {"B": 1, "T": 4096, "H": 8, "G": 8, "J": 8, "K": 128}
MIXED_DECODE = {"B": 4, "S": 8192, "H": 8, "G": 2, "J": 8, "K": 128}
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
    _mixed(
        "mixed_attention",
        MIXED,
        *({**MIXED, "B": 2, "T": T, "H": 3, "G": 1, "J": 2, "K": K} for T, K in ((63, 64), (257, 128), (100, 256))),
    ),
    _mixed(
        "mixed_attention/window",
        {**MIXED, "W": 1024},
        {**MIXED, "T": 1500, "W": 1024},
        {**MIXED, "T": 1100, "K": 64, "W": 1024},
    ),
    _mixed("mixed_attention/packed", {**MIXED, "sequences": 5}, {**MIXED, "T": 1000, "sequences": 9}),
    Operation(
        name="mixed_attention/decode",
        call=decode_with_state,
        inputs=_mixed_decode_inputs,
        cost=_mixed_decode_cost,
        inspect_shape=MIXED_DECODE,
        check_shapes=tuple(
            {**MIXED_DECODE, "B": 3, "S": S, "J": 3, "K": K} for S, K in ((257, 64), (100, 128), (300, 256))
        ),
        bench_shapes=tuple({**MIXED_DECODE, "B": B} for B in (1, 4, 32)),
        cpu_shapes=({**MIXED_DECODE, "S": 4096},),
        # Memory bound: rows of query heads against keys, vectors with states, all of it read once.
        without_products=frozenset({"mixed_decode_kernel"}),
    ),
)
