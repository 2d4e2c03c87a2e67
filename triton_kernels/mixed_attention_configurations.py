"""Block sizes of the mixed attention kernel, and its entries for inspect, bench and gpu-check.

Letters: B batch, T tokens, S cached tokens, H query heads, G key/value heads, J linear heads, K head width, W window.
"""

from typing import Any

import torch

from triton_kernels import decayed_linear_attention_configurations as linear
from triton_kernels import flash_attention_configurations as softmax
from triton_kernels.configurations import Cost, Operation, Tables, launch_table, random_inputs
from triton_kernels.decayed_linear_attention import decayed_linear_attention
from triton_kernels.flash_attention import flash_attention
from triton_kernels.mixed_attention import mixed_attention, mixed_decode

# Value columns of a linear head's state that one program of the decode launch takes.
DECODE_BLOCK = 32

# Small blocks of queries: two programs then share a processor, so that a scan, which waits for memory, has a block of queries beside it.
NAMES = "BLOCK_M BLOCK_N BLOCK CHUNK"
FORWARD: Tables = (
    launch_table(
        NAMES,
        {
            (80, 64): [(64, 64, 32, 64, 4, 3)],
            (80, 128): [(64, 32, 32, 32, 4, 3)],
            (80, 256): [(64, 32, 16, 16, 8, 2)],
            (90, 64): [(64, 64, 32, 64, 4, 3)],
            (90, 128): [(64, 64, 32, 64, 4, 2)],
            (90, 256): [(64, 32, 16, 16, 8, 2)],
            (100, 64): [(64, 64, 32, 64, 8, 2)],
            (100, 128): [(64, 64, 16, 64, 4, 2)],
            (100, 256): [(64, 64, 16, 64, 8, 2)],
        },
    ),
    # fp32 products run on the plain multipliers, as in flash_attention.
    launch_table(NAMES, {(80, 64): [(32, 32, 16, 32, 8, 1)], (80, 128): [(32, 32, 16, 16, 4, 1)], (80, 256): [(16, 32, 16, 16, 4, 1)]}),
)


def mixed_heads(*tensors: torch.Tensor, backend: str, **options: Any) -> torch.Tensor:
    """mixed_attention of both kinds of heads side by side, as a layer hands them to its output projection."""
    o_BTHV, linear_o_BTJV, _ = mixed_attention(*tensors, backend=backend, **options)
    return torch.cat((o_BTHV.flatten(2), linear_o_BTJV.flatten(2)), -1)


def call(backend: str, **inputs: Any) -> torch.Tensor:
    options = {name: inputs.pop(name) for name in ("window", "linear_scale", "cu_seqlens")}
    return mixed_heads(*inputs.values(), backend=backend, **options)


def separate_launches(window: int | None, linear_scale: float, cu_seqlens: torch.Tensor | None, **inputs: torch.Tensor) -> torch.Tensor:
    """Our own two ops, one after the other: what the common launch has to beat."""
    q, k, v, *linear_inputs = inputs.values()
    o_BTHV = flash_attention(q, k, v, window=window, cu_seqlens=cu_seqlens)
    linear_o_BTJV, _ = decayed_linear_attention(*linear_inputs, scale=linear_scale, cu_seqlens=cu_seqlens)
    return torch.cat((o_BTHV.flatten(2), linear_o_BTJV.flatten(2)), -1)


def _inputs(dtype: torch.dtype, device: str, *, B: int, T: int, H: int, G: int, J: int, K: int, W: int = 0, sequences: int = 0) -> dict[str, Any]:
    """A window of W; `sequences`: T is cut into so many, the first one empty, and every token has a decay of its own."""
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, K)} | {f"linear_{name}": (B, T, J, K) for name in "qkv"}
    inputs: dict[str, Any] = dict(random_inputs(T, dtype, device, shapes))
    inputs["log_decay"] = -(2.0 ** (-8 * (torch.arange(J, device=device) + 1) / J))
    cu_seqlens = None
    if sequences:
        inputs["log_decay"] = -random_inputs(T + 1, torch.float32, device, {"g": (B, T, J)})["g"].detach().abs().requires_grad_()
        cu_seqlens = torch.tensor([0, *(T * n // (sequences - 1) for n in range(sequences))]).to(device)
    return inputs | {"window": W or None, "linear_scale": K**-0.5, "cu_seqlens": cu_seqlens}


def _cost(element_size: int, *, B: int, T: int, H: int, G: int, J: int, K: int, W: int = 0, sequences: int = 0) -> tuple[Cost, Cost]:
    """The two ops' costs, added."""
    softmax_costs = softmax.OPERATIONS[0].cost(element_size, B=B, T=T, H=H, G=G, K=K, V=K, W=W, sequences=sequences)
    linear_costs = linear.cost(element_size, gate="token" if sequences else "fixed", B=B, T=T, H=J, K=K, V=K)
    forward, backward = (Cost(flops=a.flops + b.flops, bytes=a.bytes + b.bytes) for a, b in zip(softmax_costs, linear_costs))
    return forward, backward


def _decode_inputs(dtype: torch.dtype, device: str, *, B: int, S: int, H: int, G: int, J: int, K: int) -> dict[str, Any]:
    """Caches in use to different lengths, the last one gone round."""
    shapes = {"q_BHK": (B, H, K), "k_cache_BSGK": (B, S, G, K), "v_cache_BSGV": (B, S, G, K), "linear_qkv_BX": (B, 3 * J * K)}
    inputs = random_inputs(S, dtype, device, shapes) | random_inputs(S + 1, torch.float32, device, {"state_BJKV": (B, J, K, K)})
    lengths_B = torch.tensor([max(0, S + 5 - 7 * b) for b in reversed(range(B))]).to(device)
    slopes = 2.0 ** (-8 * (torch.arange(J, device=device) + 1) / J)
    return {name: x.detach() for name, x in inputs.items()} | {"lengths_B": lengths_B, "log_decay_J": -slopes}


def _decode_cost(element_size: int, *, B: int, S: int, H: int, G: int, J: int, K: int) -> tuple[Cost, None]:
    """The caches read, the states read and written, what goes in and out of the heads."""
    cached, states, ends = 2 * B * S * G * K, B * J * K * K, 2 * B * K * (H + 2 * J)
    return Cost(flops=4 * B * S * H * K + 5 * states, bytes=element_size * (cached + ends) + 8 * states), None


def decode_with_state(**inputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs, and the state that was updated in place: gpu-check compares all of them."""
    return *mixed_decode(**inputs), inputs["state_BJKV"]


def _operation(name: str, shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    return Operation(
        name=name,
        call=call,
        inputs=_inputs,
        cost=_cost,
        inspect_shape=shape,
        check_shapes=check_shapes,
        bench_shapes=(shape, {**shape, "T": 16384}),
        cpu_shape={**shape, "T": 2048, "H": 4, "G": 2, "J": 4, "K": 64},
        peers={"separate launches": separate_launches},
        without_products=frozenset({"gate_gradient_kernel"}),
    )


SHAPE = {"B": 1, "T": 4096, "H": 8, "G": 8, "J": 8, "K": 128}
DECODE_SHAPE = {"B": 4, "S": 8192, "H": 8, "G": 2, "J": 8, "K": 128}
OPERATIONS = (
    _operation("mixed_attention", SHAPE, *({**SHAPE, "B": 2, "T": T, "H": 3, "G": 1, "J": 2, "K": K} for T, K in ((63, 64), (257, 128), (100, 256)))),
    _operation("mixed_attention/window", {**SHAPE, "W": 1024}, {**SHAPE, "T": 1500, "W": 1024}, {**SHAPE, "T": 1100, "K": 64, "W": 1024}),
    _operation("mixed_attention/packed", {**SHAPE, "sequences": 5}, {**SHAPE, "T": 1000, "sequences": 9}),
    Operation(
        name="mixed_attention/decode",
        call=decode_with_state,
        inputs=_decode_inputs,
        cost=_decode_cost,
        inspect_shape=DECODE_SHAPE,
        check_shapes=tuple({**DECODE_SHAPE, "B": 3, "S": S, "J": 3, "K": K} for S, K in ((257, 64), (100, 128), (300, 256))),
        bench_shapes=tuple({**DECODE_SHAPE, "B": B} for B in (1, 4, 32)),
        cpu_shape={**DECODE_SHAPE, "S": 4096},
        # Memory bound: rows of query heads against keys, vectors with states, all of it read once.
        without_products=frozenset({"mixed_decode_kernel", "reduce_kernel"}),
    ),
)
