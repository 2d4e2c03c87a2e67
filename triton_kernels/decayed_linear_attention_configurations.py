"""Decayed linear attention as data: launch tables, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, H heads, K key width, V value width.
"""

from typing import Any

import torch

from triton_kernels.configurations import Cost, LaunchOptions, LaunchTable, Operation, Shape, random_inputs
from triton_kernels.decayed_linear_attention import decayed_linear_attention

# A launch should keep every multiprocessor of an H200 busy; a segment shorter than this costs more than it brings.
MIN_PROGRAMS = 132
MIN_SEGMENT = 256

# The gate's gradient is summed within slots of this many chunks: shorter ones move more bytes of state, longer ones pile up rounding errors.
ANCHOR = 4


def slices(*widths_and_warps: tuple[int, int], num_stages: int = 2, chunk: int = 64) -> tuple[LaunchOptions, ...]:
    """Options for slices of the given widths, widest first: the launcher takes the first that fills the device. `chunk` caps the chunk length."""
    return tuple(LaunchOptions(blocks={"BLOCK": block, "CHUNK": chunk}, num_warps=warps, num_stages=num_stages) for block, warps in widths_and_warps)


# Every line is the widest slice that the offline compiler fits into registers without a spill, in each pass.
LAUNCHES = LaunchTable(
    lines={
        (80, 64): slices((32, 4)),
        (80, 128): slices((32, 4), chunk=32),
        (80, 256): slices((16, 8), chunk=16, num_stages=1),
        (90, 64): slices((64, 8), (32, 4)),
        (90, 128): slices((32, 4)),
        (90, 256): slices((16, 8), chunk=16),
        (100, 64): slices((32, 4)),
        (100, 128): slices((16, 4)),
        (100, 256): slices((16, 8)),
    }
)


def inputs(dtype: torch.dtype, device: str, *, gate: str, B: int, T: int, H: int, K: int, V: int) -> dict[str, Any]:
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, {"q_BTHK": (B, T, H, K), "k_BTHK": (B, T, H, K), "v_BTHV": (B, T, H, V)}))
    if gate == "token":
        tensors["log_decay"] = -random_inputs(T + 1, torch.float32, device, {"g": (B, T, H)})["g"].detach().abs().requires_grad_()
    else:
        # Slopes of lightning attention: geometric over the heads.
        tensors["log_decay"] = -(2.0 ** (-8 * (torch.arange(H, device=device) + 1) / H))
    return tensors | {"scale": K**-0.5}


def fixed_inputs(dtype: torch.dtype, device: str, **shape: int) -> dict[str, Any]:
    return inputs(dtype, device, gate="fixed", **shape)


def token_inputs(dtype: torch.dtype, device: str, **shape: int) -> dict[str, Any]:
    return inputs(dtype, device, gate="token", **shape)


def cost(element_size: int, *, gate_bytes: int, B: int, T: int, H: int, K: int, V: int) -> tuple[Cost, Cost]:
    """Chunks of 64: scores, their product with the values, and the state read and written; the backward does two and a half times as much."""
    rows, chunk = B * T * H, 64
    flops = rows * 2 * (chunk * K + chunk * V + 2 * K * V)
    forward = rows * (element_size * (2 * K + 2 * V) + gate_bytes)
    backward = rows * (element_size * (4 * K + 3 * V) + 2 * gate_bytes)
    return Cost(flops=flops, bytes=forward), Cost(flops=2.5 * flops, bytes=backward)


def fixed_cost(element_size: int, **shape: int) -> tuple[Cost, Cost]:
    return cost(element_size, gate_bytes=0, **shape)


def token_cost(element_size: int, **shape: int) -> tuple[Cost, Cost]:
    return cost(element_size, gate_bytes=4, **shape)


SHAPES: dict[str, Any] = {
    "inspect_shape": {"B": 1, "T": 4096, "H": 16, "K": 128, "V": 128},
    "check_shapes": (
        {"B": 2, "T": 63, "H": 3, "K": 64, "V": 64},
        {"B": 1, "T": 1000, "H": 2, "K": 128, "V": 128},
        {"B": 2, "T": 257, "H": 40, "K": 128, "V": 64},
        {"B": 1, "T": 300, "H": 70, "K": 64, "V": 128},
        {"B": 1, "T": 100, "H": 2, "K": 256, "V": 256},
    ),
    "bench_shapes": (
        {"B": 1, "T": 4096, "H": 16, "K": 128, "V": 128},
        {"B": 4, "T": 4096, "H": 16, "K": 128, "V": 128},
        {"B": 8, "T": 2048, "H": 16, "K": 64, "V": 64},
        {"B": 1, "T": 65536, "H": 16, "K": 128, "V": 128},
    ),
    "cpu_shape": {"B": 1, "T": 2048, "H": 8, "K": 64, "V": 64},
}


def fla_token(q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor, log_decay: torch.Tensor, scale: float) -> torch.Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return chunk_simple_gla(q_BTHK, k_BTHK, v_BTHV, g=log_decay, scale=scale)[0]


def fla_fixed(q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor, log_decay: torch.Tensor, scale: float) -> torch.Tensor:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return chunk_simple_gla(q_BTHK, k_BTHK, v_BTHV, g_gamma=log_decay, scale=scale)[0]


def transformers_lightning(q_BTHK: torch.Tensor, k_BTHK: torch.Tensor, v_BTHV: torch.Tensor, log_decay: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention of transformers' MiniMax layer alone: its projections, norm and output gate are replaced by what passes its input through."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class Open(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_full((), 40.0)

    heads, width = q_BTHK.shape[2:]
    layer: Any = MiniMaxLightningAttention(MiniMaxConfig(hidden_size=width, num_attention_heads=heads, head_dim=width), layer_idx=0)
    layer.act_fn = layer.qkv_proj = layer.norm = layer.out_proj = torch.nn.Identity()
    layer.output_gate = Open()
    layer.slope_rate = -log_decay[:, None, None].to(q_BTHK.dtype)
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    packed = torch.cat((q_BTHK * scale, k_BTHK, v_BTHV), -1).flatten(2)
    return layer(packed, None, None)[0].view_as(v_BTHV)


def operation(name: str, draw: Any, least: Any, fla: Any, shapes: dict[str, Shape]) -> Operation:
    return Operation(
        name=f"decayed_linear_attention/{name}",
        call=decayed_linear_attention,
        inputs=draw,
        cost=least,
        peers={"fla": fla},
        cpu_peers={"transformers": transformers_lightning} if name == "fixed" else {},
        without_products=frozenset({"gate_gradient_kernel"}),
        **shapes,  # pyright: ignore[reportArgumentType]
    )


OPERATIONS = (
    operation("token", token_inputs, token_cost, fla_token, SHAPES),
    operation("fixed", fixed_inputs, fixed_cost, fla_fixed, SHAPES),
)
