"""mixed_attention and mixed_decode as inspect, bench and gpu-check know them.

Legend: B batch, T queries, S cached tokens, H query heads, G key/value heads, J linear heads, K width of every head, W
window, X channels of the linear heads' queries, keys and values side by side.
"""

from typing import Any

import torch
from torch import Tensor

from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.mixed.mixed_attention import mixed_attention, mixed_decode
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.tools.catalogue.linear import decayed_cost, lightning_slopes
from triton_kernels.tools.catalogue.softmax import attention_cost
from triton_kernels.tools.operations import Cost, Operation, packed_offsets, random_inputs


def _mixed_inputs(
    dtype: torch.dtype, device: str, *, W: int = 0, sequences: int = 0, every_option: int = 0, **sizes: int
) -> dict[str, Any]:
    """A window of W; `sequences`: T is cut into so many, and every token has a decay of its own; every_option: sinks
    and initial states too. All heads are K wide."""
    T, J, K = sizes["T"], sizes["J"], sizes["K"]
    sizes |= {"S": T, "V": K, "N": sequences}
    names = ("q_BTHK", "k_BSGK", "v_BSGV", "linear_q_BTJK", "linear_k_BTJK", "linear_v_BTJV")
    inputs: dict[str, Any] = dict(random_inputs(T, dtype, device, sizes, *names))
    if every_option:
        inputs |= random_inputs(T + 2, torch.float32, device, sizes, "sinks_H", "initial_state_NJKV")
    if sequences:
        inputs["log_decay"] = (
            -random_inputs(T + 1, torch.float32, device, sizes, "gate_BTJ")["gate_BTJ"].detach().abs().requires_grad_()
        )
        inputs["cu_seqlens"] = packed_offsets(T, sequences, device)
    else:
        inputs["log_decay"] = lightning_slopes(J, device)
    return {**inputs, "window": W or None, "linear_scale": K**-0.5}


def _mixed_cost(
    element_size: int, *, B: int, T: int, H: int, G: int, J: int, K: int, W: int = 0, sequences: int = 0, **_: int
) -> tuple[Cost, Cost]:
    """The two ops' costs, added."""
    softmax_costs = attention_cost(element_size, B=B, T=T, H=H, G=G, K=K, V=K, W=W, sequences=sequences)
    linear_costs = decayed_cost(element_size, gate="token" if sequences else "fixed", B=B, T=T, H=J, K=K, V=K)
    forward, backward = (
        Cost(flops=a.flops + b.flops, bytes=a.bytes + b.bytes) for a, b in zip(softmax_costs, linear_costs)
    )
    return forward, backward


def mixed_heads(**inputs: Any) -> Tensor:
    """mixed_attention of both kinds of heads side by side, as a layer hands them to its output projection."""
    o_BTHV, linear_o_BTJV, _ = mixed_attention(**inputs)
    return torch.cat((o_BTHV.flatten(2), linear_o_BTJV.flatten(2)), -1)


def mixed_heads_and_state(**inputs: Any) -> Tensor:
    """What the heads give and the final states of the linear ones, in one tensor, so that all have a gradient."""
    return torch.cat([output.flatten() for output in mixed_attention(**inputs)])


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
        "log_decay_J": lightning_slopes(J, device),
    }


def _mixed_decode_cost(element_size: int, *, B: int, S: int, H: int, G: int, J: int, K: int) -> tuple[Cost, None]:
    """The caches read, the states read and written, what goes in and out of the heads."""
    cached, states, ends = 2 * B * S * G * K, B * J * K * K, 2 * B * K * (H + 2 * J)
    return Cost(flops=4 * B * S * H * K + 5 * states, bytes=element_size * (cached + ends) + 8 * states), None


def decode_with_state(**inputs: Any) -> tuple[Tensor, ...]:
    """The outputs, and the state that was updated in place: gpu-check compares all of them."""
    return *mixed_decode(**inputs), inputs["state_BJKV"]


MIXED = {"B": 1, "T": 4096, "H": 8, "G": 8, "J": 8, "K": 128}
MIXED_DECODE = {"B": 4, "S": 8192, "H": 8, "G": 2, "J": 8, "K": 128}
OPERATIONS = (
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
        name="mixed_attention/every_option",
        call=mixed_heads_and_state,
        inputs=_mixed_inputs,
        cost=_mixed_cost,
        inspect_shape={**MIXED, "G": 2, "W": 1024, "sequences": 5, "every_option": 1},
        check_shapes=({**MIXED, "T": 1500, "G": 2, "K": 96, "W": 1024, "sequences": 4, "every_option": 1},),
        without_products=frozenset({"gate_gradient_kernel"}),
    ),
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
