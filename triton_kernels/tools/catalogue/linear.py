"""The linear-attention ops as inspect, bench and gpu-check know them.

Legend: B batch, T tokens, G query/key heads, H heads (value heads where there are G too), K key width, V value width,
N packed sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.tools import peers
from triton_kernels.tools.operations import Cost, Operation, packed_offsets, random_inputs


def lightning_slopes(heads: int, device: str) -> Tensor:
    """Log-decays of lightning attention [heads]: geometric over the heads."""
    return -(2.0 ** (-8 * (torch.arange(heads, device=device) + 1) / heads))


def packed_states(device: str, N: int, **sizes: int) -> dict[str, Tensor]:
    """Offsets of N sequences, and the states that they start from."""
    states = random_inputs(N, torch.float32, device, {**sizes, "B": N}, "initial_state_BHKV")
    return {"cu_seqlens": packed_offsets(sizes["T"], N, device), **states}


def with_final_state(call: Callable[..., tuple[Tensor, Tensor]], **inputs: Any) -> Tensor:
    """Output and final states in one tensor, so that both have a gradient."""
    return torch.cat([output.flatten() for output in call(**inputs)])


def decayed_inputs(dtype: torch.dtype, device: str, *, gate: str, N: int = 0, **sizes: int) -> dict[str, Any]:
    """N > 0: T is cut into so many sequences, each with an initial state."""
    tensors: dict[str, Any] = dict(random_inputs(sizes["T"], dtype, device, sizes, "q_BTHK", "k_BTHK", "v_BTHV"))
    if gate == "token":
        tensors["log_decay"] = (
            -random_inputs(sizes["T"] + 1, torch.float32, device, sizes, "g_BTH")["g_BTH"]
            .detach()
            .abs()
            .requires_grad_()
        )
    else:
        tensors["log_decay"] = lightning_slopes(sizes["H"], device)
    return tensors | {"scale": sizes["K"] ** -0.5} | (packed_states(device, N, **sizes) if N else {})


def state_bytes(N: int, H: int, K: int, V: int) -> int:
    """Initial and final states of N sequences; the backward moves their gradients, as many."""
    return 2 * N * H * K * V * 4


def decayed_cost(
    element_size: int, *, gate: str, B: int, T: int, H: int, K: int, V: int, N: int = 0
) -> tuple[Cost, Cost]:
    """Chunks of 64: scores, their product with the values, and the state read and written; the backward does two and a
    half times as much."""
    rows, chunk, gate_bytes = B * T * H, 64, 4 * (gate == "token")
    flops = rows * 2 * (chunk * K + chunk * V + 2 * K * V)
    states = state_bytes(N, H, K, V)
    forward = rows * (element_size * (2 * K + 2 * V) + gate_bytes) + states
    backward = rows * (element_size * (4 * K + 3 * V) + 2 * gate_bytes) + states
    return Cost(flops=flops, bytes=forward), Cost(flops=2.5 * flops, bytes=backward)


def delta_inputs(dtype: torch.dtype, device: str, *, gate: str | None, N: int = 0, **sizes: int) -> dict[str, Any]:
    """`gate` names the log-decay by its axes; None for the plain delta rule. N as in `decayed_inputs`."""
    tensors: dict[str, Any] = dict(random_inputs(sizes["T"], dtype, device, sizes, "q_BTGK", "k_BTGK", "v_BTHV"))
    raw = random_inputs(sizes["T"] + 1, torch.float32, device, sizes, gate or "g_BTH", "beta_BTH")
    tensors["log_decay"] = -raw[gate].detach().abs().requires_grad_() if gate else None
    # Up to 2, negative eigenvalues, but where channels decay on their own.
    largest = 1 if gate == "g_BTHK" else 2
    tensors["beta_BTH"] = (largest * raw["beta_BTH"].detach().sigmoid()).requires_grad_()
    return tensors | {"normalize_qk": True} | (packed_states(device, N, **sizes) if N else {})


def call_delta(log_decay: torch.Tensor | None, **tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if log_decay is not None and log_decay.dim() == 4:
        return kimi_delta_attention(log_decay_BTHK=log_decay, **tensors)
    return gated_delta_rule(log_decay_BTH=log_decay, **tensors)


def delta_cost(
    element_size: int, *, gate: str | None, B: int, T: int, G: int, H: int, K: int, V: int, N: int = 0
) -> tuple[Cost, Cost]:
    """Chunks of 64; products counted as notes/kernels/gated_delta_rule.md lists them, causal halves as wholes, the
    inverse at a third of one product; beta and log-decay in fp32."""
    C, rows, group = 64, B * T * H, H // G
    gates = 4 * (1 + {None: 0, "g_BTH": 1, "g_BTHK": K}[gate])
    forward_flops = 2 * rows * (2 * C * K + 2 * C * V + 3 * K * V + C * C / 3)
    backward_flops = 2 * rows * (6 * C * K + 4 * C * V + 8 * K * V)
    states = state_bytes(N, H, K, V)
    forward = rows * (element_size * (2 * K / group + 2 * V) + gates) + states
    backward = rows * (element_size * (4 * K / group + 3 * V) + 2 * gates) + states
    return Cost(flops=forward_flops, bytes=forward), Cost(flops=backward_flops, bytes=backward)


def shapes(letters: str, *sizes: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(letters, shape, strict=True)) for shape in sizes)


def decayed_operation(gate: str) -> Operation:
    transformers = {"transformers": peers.transformers_lightning} if gate == "fixed" else {}
    check = (
        (2, 63, 3, 64, 64),
        (1, 1000, 2, 128, 128),
        (2, 257, 40, 128, 64),
        (1, 300, 70, 64, 128),
        (1, 100, 2, 256, 256),
    )
    return Operation(
        name=f"decayed_linear_attention/{gate}",
        call=decayed_linear_attention,
        inputs=partial(decayed_inputs, gate=gate),
        cost=partial(decayed_cost, gate=gate),
        inspect_shape=shapes("BTHKV", (1, 4096, 16, 128, 128))[0],
        check_shapes=shapes("BTHKV", *check),
        bench_shapes=shapes(
            "BTHKV", (4, 4096, 16, 128, 128), (1, 4096, 16, 128, 128), (8, 2048, 16, 64, 64), (1, 65536, 16, 128, 128)
        ),
        cpu_shapes=shapes("BTHKV", *((B, 2048, 8, 64, 64) for B in (1, 4))),
        peers={"fla": peers.fla_simple_gla} | transformers,
        cpu_peers={"loop": peers.loop_linear_attention} | transformers,
        without_products=frozenset({"gate_gradient_kernel"}),
    )


def delta_operation(name: str, gate: str | None, heads: int, *check_shapes: tuple[int, ...]) -> Operation:
    """`heads` value heads on 16 query/key heads."""
    shape = shapes("BTGHKV", (1, 4096, 16, heads, 128, 128))[0]
    transformers = {"transformers": peers.transformers_delta} if gate else {}
    return Operation(
        name=name,
        call=call_delta,
        inputs=partial(delta_inputs, gate=gate),
        cost=partial(delta_cost, gate=gate),
        inspect_shape=shape,
        check_shapes=shapes("BTGHKV", *check_shapes),
        bench_shapes=({**shape, "B": 4}, shape, {**shape, "T": 32768}),
        # With a decay per channel transformers' form goes through 11 GB of temporaries a sequence.
        cpu_shapes=shapes("BTGHKV", *((B, 2048, 8, 8, 64, 64) for B in ((1, 2) if gate == "g_BTHK" else (1, 4)))),
        peers={"fla": peers.fla_delta} | (transformers if gate == "g_BTH" else {}),
        cpu_peers={"loop": peers.loop_delta} | transformers,
        without_products=frozenset({"finish_kernel"}),
    )


def every_option(name: str, plain: Operation, shape: dict[str, int]) -> Operation:
    """`plain` on packed sequences, from initial states, with a gradient through the final ones; checked at odd
    lengths."""
    return Operation(
        name=f"{name}/every_option",
        call=partial(with_final_state, plain.call),
        inputs=plain.inputs,
        cost=plain.cost,
        inspect_shape={**shape, "N": 5},
        check_shapes=({**shape, "T": 777, "N": 4},),
        without_products=plain.without_products,
    )


COMMON_SHAPES = (2, 63, 3, 3, 64, 64), (2, 257, 5, 40, 128, 64), (1, 1, 1, 2, 32, 32)
PLAIN = (
    decayed_operation("token"),
    decayed_operation("fixed"),
    delta_operation("gated_delta_rule", "g_BTH", 16, *COMMON_SHAPES, (1, 2100, 2, 2, 128, 128)),
    delta_operation("gated_delta_rule/grouped", "g_BTH", 32, (2, 257, 2, 4, 128, 128)),
    delta_operation("gated_delta_rule/ungated", None, 16, (2, 257, 2, 2, 128, 128)),
    delta_operation("kimi_delta_attention", "g_BTHK", 16, *COMMON_SHAPES, (1, 2100, 2, 4, 128, 128)),
)
GROUPED = shapes("BTGHKV", (1, 4096, 16, 32, 128, 128))[0]
OPERATIONS = (
    *PLAIN,
    every_option("decayed_linear_attention", PLAIN[0], shapes("BTHKV", (1, 4096, 16, 128, 128))[0]),
    every_option("gated_delta_rule", PLAIN[2], GROUPED),
    every_option("kimi_delta_attention", PLAIN[-1], GROUPED),
)
