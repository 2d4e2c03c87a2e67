"""Kimi delta attention as data: launch tables, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width.
"""

from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, launch_table, random_inputs
from triton_kernels.gated_delta_rule_configurations import cost as delta_cost
from triton_kernels.gated_delta_rule_configurations import shape
from triton_kernels.kimi_delta_attention import kimi_delta_attention

# Two tables each: for 2-byte elements, and for fp32. Slices of a scan are listed widest first: it takes the first that fills the device.
SINGLE_SCAN = launch_table("BLOCK", {(80, 128): [(16, 8, 1)]})
PREPARE = (launch_table("BLOCK", {(80, 128): [(32, 8, 1)]}), launch_table("BLOCK", {(80, 128): [(32, 8, 1)]}))
SCAN_FORWARD = (launch_table("BLOCK", {(80, 128): [(32, 4, 2), (16, 4, 2)]}), SINGLE_SCAN)
SCAN_BACKWARD = (
    launch_table("BLOCK", {(80, 128): [(16, 4, 1)], (90, 128): [(32, 4, 2), (16, 4, 2)], (100, 128): [(16, 8, 2)]}),
    SINGLE_SCAN,
)
GRADIENTS = (launch_table("BLOCK", {(80, 64): [(32, 8, 1)], (80, 128): [(64, 8, 1)]}), launch_table("BLOCK", {(80, 128): [(16, 8, 1)]}))

# Channels of one program of the gradients, and rows of one that finishes them.
CHANNELS = 32
FINISH_ROWS = 32


def inputs(dtype: torch.dtype, device: str, *, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Any]:
    shapes = {"q_BTGK": (B, T, G, K), "k_BTGK": (B, T, G, K), "v_BTHV": (B, T, H, V)}
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, shapes))
    raw = random_inputs(T + 1, torch.float32, device, {"g": (B, T, H, K), "beta": (B, T, H)})
    tensors["log_decay"] = -raw["g"].detach().abs().requires_grad_()
    tensors["beta_BTH"] = raw["beta"].detach().sigmoid().requires_grad_()
    return tensors | {"normalize_qk": True}


def call(log_decay: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return kimi_delta_attention(log_decay_BTHK=log_decay, **tensors)


def cost(element_size: int, **sizes: int) -> tuple[Cost, Cost]:
    return delta_cost(element_size, gate_width=sizes["K"], **sizes)


OPERATIONS = (
    Operation(
        name="kimi_delta_attention",
        call=call,
        inputs=inputs,
        cost=cost,
        inspect_shape=shape(1, 4096, 16, 16, 128, 128),
        check_shapes=(shape(2, 63, 3, 3, 64, 64), shape(1, 1000, 2, 4, 128, 128), shape(2, 257, 5, 40, 128, 64), shape(1, 1, 1, 2, 32, 32)),
        bench_shapes=(shape(4, 4096, 16, 16, 128, 128), shape(1, 4096, 16, 16, 128, 128), shape(1, 32768, 16, 16, 128, 128)),
        cpu_shape=shape(1, 2048, 8, 8, 64, 64),
        peers={"fla": peers.fla_delta},
        cpu_peers={"transformers": peers.transformers_delta, "loop": peers.loop_delta},
        without_products=frozenset({"finish_kernel"}),
    ),
)
