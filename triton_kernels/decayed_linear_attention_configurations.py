"""Decayed linear attention as data: launch table, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, launch_table, random_inputs
from triton_kernels.decayed_linear_attention import decayed_linear_attention

# A launch should keep every multiprocessor of an H200 busy; a segment shorter than this costs more than it brings.
MIN_PROGRAMS = 132
MIN_SEGMENT = 256

# The gate's gradient is summed within slots of this many chunks: shorter ones move more bytes of state, longer ones pile up rounding errors.
ANCHOR = 4

# Slices of the state, widest first (the launcher takes the first that fills the device), and a cap on the chunk length. Every slice is the widest
# that the offline compiler fits into registers without a spill, in each pass.
LAUNCHES = launch_table(
    "BLOCK CHUNK",
    {
        (80, 64): [(32, 64, 4, 2)],
        (80, 128): [(32, 32, 4, 2)],
        (80, 256): [(16, 16, 8, 1)],
        (90, 64): [(64, 64, 8, 2), (32, 64, 4, 2)],
        (90, 128): [(32, 64, 4, 2)],
        (90, 256): [(16, 16, 8, 2)],
        (100, 64): [(32, 64, 4, 2)],
        (100, 128): [(16, 64, 4, 2)],
        (100, 256): [(16, 64, 8, 2)],
    },
)


def inputs(dtype: torch.dtype, device: str, *, gate: str, B: int, T: int, H: int, K: int, V: int) -> dict[str, Any]:
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, {"q_BTHK": (B, T, H, K), "k_BTHK": (B, T, H, K), "v_BTHV": (B, T, H, V)}))
    if gate == "token":
        tensors["log_decay"] = -random_inputs(T + 1, torch.float32, device, {"g": (B, T, H)})["g"].detach().abs().requires_grad_()
    else:
        # Slopes of lightning attention: geometric over the heads.
        tensors["log_decay"] = -(2.0 ** (-8 * (torch.arange(H, device=device) + 1) / H))
    return tensors | {"scale": K**-0.5}


def cost(element_size: int, *, gate: str, B: int, T: int, H: int, K: int, V: int) -> tuple[Cost, Cost]:
    """Chunks of 64: scores, their product with the values, and the state read and written; the backward does two and a half times as much."""
    rows, chunk, gate_bytes = B * T * H, 64, 4 * (gate == "token")
    flops = rows * 2 * (chunk * K + chunk * V + 2 * K * V)
    forward = rows * (element_size * (2 * K + 2 * V) + gate_bytes)
    backward = rows * (element_size * (4 * K + 3 * V) + 2 * gate_bytes)
    return Cost(flops=flops, bytes=forward), Cost(flops=2.5 * flops, bytes=backward)


def shape(B: int, T: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"B": B, "T": T, "H": H, "K": K, "V": V}


def operation(gate: str) -> Operation:
    transformers = {"transformers": peers.transformers_lightning} if gate == "fixed" else {}
    return Operation(
        name=f"decayed_linear_attention/{gate}",
        call=decayed_linear_attention,
        inputs=partial(inputs, gate=gate),
        cost=partial(cost, gate=gate),
        inspect_shape=shape(1, 4096, 16, 128, 128),
        check_shapes=(
            shape(2, 63, 3, 64, 64),
            shape(1, 1000, 2, 128, 128),
            shape(2, 257, 40, 128, 64),
            shape(1, 300, 70, 64, 128),
            shape(1, 100, 2, 256, 256),
        ),
        bench_shapes=(shape(4, 4096, 16, 128, 128), shape(1, 4096, 16, 128, 128), shape(8, 2048, 16, 64, 64), shape(1, 65536, 16, 128, 128)),
        cpu_shape=shape(1, 2048, 8, 64, 64),
        peers={"fla": peers.fla_simple_gla} | transformers,
        cpu_peers={"loop": peers.loop_linear_attention} | transformers,
        without_products=frozenset({"gate_gradient_kernel"}),
    )


OPERATIONS = (operation("token"), operation("fixed"))
