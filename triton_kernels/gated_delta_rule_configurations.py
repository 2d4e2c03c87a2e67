"""The gated delta rule as data: launch tables, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, launch_table, random_inputs
from triton_kernels.gated_delta_rule import gated_delta_rule

# Two tables each: for 2-byte elements, and for fp32. Slices of a scan are listed widest first: it takes the first that fills the device.
SINGLE_SCAN = launch_table("BLOCK", {(80, 128): [(16, 8, 1)]})
PREPARE = (launch_table("BLOCK", {(80, 128): [(128, 4, 1)]}), launch_table("BLOCK", {(80, 128): [(32, 8, 1)]}))
SCAN_FORWARD = (launch_table("BLOCK", {(80, 128): [(32, 4, 2), (16, 4, 2)]}), SINGLE_SCAN)
SCAN_BACKWARD = (launch_table("BLOCK", {(80, 128): [(16, 4, 1)], (90, 128): [(32, 4, 2), (16, 4, 2)], (100, 128): [(16, 4, 2)]}), SINGLE_SCAN)
GRADIENTS = (
    launch_table("BLOCK", {(80, 64): [(16, 4, 1)], (80, 128): [(64, 8, 1)], (90, 64): [(32, 8, 1)], (90, 128): [(64, 8, 1)]}),
    launch_table("BLOCK", {(80, 128): [(32, 8, 1)]}),
)


def inputs(dtype: torch.dtype, device: str, *, gated: bool, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Any]:
    shapes = {"q_BTGK": (B, T, G, K), "k_BTGK": (B, T, G, K), "v_BTHV": (B, T, H, V)}
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, shapes))
    raw = random_inputs(T + 1, torch.float32, device, {"g": (B, T, H), "beta": (B, T, H)})
    tensors["log_decay"] = -raw["g"].detach().abs().requires_grad_() if gated else None
    # Up to 2: negative eigenvalues.
    tensors["beta_BTH"] = (2 * raw["beta"].detach().sigmoid()).requires_grad_()
    return tensors | {"normalize_qk": True}


def call(log_decay: torch.Tensor | None, **tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return gated_delta_rule(log_decay_BTH=log_decay, **tensors)


def cost(element_size: int, *, gate_width: int, B: int, T: int, G: int, H: int, K: int, V: int) -> tuple[Cost, Cost]:
    """Chunks of 64; products counted as `chunk_rule.py` lists them, causal halves as wholes, the inverse at a third of one product; beta and a
    log-decay of `gate_width` per head in fp32."""
    C, rows, group, gates = 64, B * T * H, H // G, 4 * (1 + gate_width)
    forward_flops = 2 * rows * (2 * C * K + 2 * C * V + 3 * K * V + C * C / 3)
    backward_flops = 2 * rows * (6 * C * K + 4 * C * V + 8 * K * V)
    forward = rows * (element_size * (2 * K / group + 2 * V) + gates)
    backward = rows * (element_size * (4 * K / group + 3 * V) + 2 * gates)
    return Cost(flops=forward_flops, bytes=forward), Cost(flops=backward_flops, bytes=backward)


def shape(B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"B": B, "T": T, "G": G, "H": H, "K": K, "V": V}


def operation(name: str, gated: bool, inspect_shape: dict[str, int], *check_shapes: dict[str, int]) -> Operation:
    transformers = {"transformers": peers.transformers_delta} if gated else {}
    return Operation(
        name=name,
        call=call,
        inputs=partial(inputs, gated=gated),
        cost=partial(cost, gate_width=int(gated)),
        inspect_shape=inspect_shape,
        check_shapes=check_shapes,
        bench_shapes=({**inspect_shape, "B": 4}, inspect_shape, {**inspect_shape, "T": 32768}),
        cpu_shape=shape(1, 2048, 8, 8, 64, 64),
        peers={"fla": peers.fla_delta} | transformers,
        cpu_peers={"loop": peers.loop_delta} | transformers,
    )


OPERATIONS = (
    operation(
        "gated_delta_rule",
        True,
        shape(1, 4096, 16, 16, 128, 128),
        *(shape(2, 63, 3, 3, 64, 64), shape(1, 1000, 2, 2, 128, 128), shape(2, 257, 5, 40, 128, 64), shape(1, 1, 1, 2, 32, 32)),
    ),
    operation("gated_delta_rule/grouped", True, shape(1, 4096, 16, 32, 128, 128), shape(2, 257, 2, 4, 128, 128)),
    operation("gated_delta_rule/ungated", False, shape(1, 4096, 16, 16, 128, 128), shape(2, 257, 2, 2, 128, 128)),
)
