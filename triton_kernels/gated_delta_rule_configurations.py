"""The gated delta rule as data: launch tables, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.configurations import Cost, Operation, random_inputs
from triton_kernels.delta_launch import Tables, chunks, everywhere, slices
from triton_kernels.gated_delta_rule import gated_delta_rule

SINGLE_SCAN = everywhere(slices(16, warps=4, stages=1))
PREPARE: Tables = (everywhere(chunks(warps=4, stages=1)), everywhere(chunks(warps=8, stages=1)))
SCAN_FORWARD: Tables = (everywhere(slices(32, 16, warps=4, stages=2)), SINGLE_SCAN)
SCAN_BACKWARD: Tables = (everywhere(slices(32, 16, warps=4, stages=2), sm_80=slices(16, warps=4, stages=1)), SINGLE_SCAN)
GRADIENTS: Tables = (everywhere(slices(64, warps=8, stages=1)), everywhere(slices(32, warps=8, stages=1)))


def _inputs(dtype: torch.dtype, device: str, *, gated: bool, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Any]:
    shapes = {"q_BTGK": (B, T, G, K), "k_BTGK": (B, T, G, K), "v_BTHV": (B, T, H, V)}
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, shapes))
    raw = random_inputs(T + 1, torch.float32, device, {"g": (B, T, H), "beta": (B, T, H)})
    tensors["log_decay_BTH"] = -raw["g"].detach().abs().requires_grad_() if gated else None
    tensors["beta_BTH"] = (2 * raw["beta"].detach().sigmoid()).requires_grad_()
    return tensors | {"normalize_qk": True}


def _cost(element_size: int, *, gated: bool, B: int, T: int, G: int, H: int, K: int, V: int) -> tuple[Cost, Cost]:
    """Chunks of 64; products counted as `delta_chunked.py` lists them, causal halves as wholes, the inverse at a third of one product."""
    C, rows, gates = 64, B * T * H, 4 * (1 + gated)
    forward_flops = 2 * rows * (2 * C * K + 2 * C * V + 3 * K * V + C * C / 3)
    backward_flops = 2 * rows * (6 * C * K + 4 * C * V + 8 * K * V)
    group = H // G
    forward = rows * (element_size * (2 * K / group + 2 * V) + gates)
    backward = rows * (element_size * (4 * K / group + 3 * V) + 2 * gates)
    return Cost(flops=forward_flops, bytes=forward), Cost(flops=backward_flops, bytes=backward)


def _fla(
    q_BTGK: torch.Tensor, k_BTGK: torch.Tensor, v_BTHV: torch.Tensor, log_decay_BTH: torch.Tensor | None, beta_BTH: torch.Tensor, normalize_qk: bool
) -> torch.Tensor:
    from fla.ops.delta_rule import chunk_delta_rule  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    if log_decay_BTH is None:
        return chunk_delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]
    return chunk_gated_delta_rule(q_BTGK, k_BTGK, v_BTHV, g=log_decay_BTH, beta=beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]


def _transformers(
    q_BTGK: torch.Tensor, k_BTGK: torch.Tensor, v_BTHV: torch.Tensor, log_decay_BTH: torch.Tensor, beta_BTH: torch.Tensor, normalize_qk: bool
) -> torch.Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]


def _shape(B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"B": B, "T": T, "G": G, "H": H, "K": K, "V": V}


def _operation(name: str, gated: bool, inspect_shape: dict[str, int], check_shapes: tuple[dict[str, int], ...]) -> Operation:
    return Operation(
        name=name,
        call=gated_delta_rule,
        inputs=partial(_inputs, gated=gated),
        cost=partial(_cost, gated=gated),
        inspect_shape=inspect_shape,
        check_shapes=check_shapes,
        bench_shapes=(inspect_shape, {**inspect_shape, "B": 4}, {**inspect_shape, "T": 32768}),
        cpu_shape=_shape(1, 2048, 8, 8, 64, 64),
        peers={"fla": _fla},
        cpu_peers={"transformers": _transformers} if gated else {},
    )


OPERATIONS = (
    _operation(
        "gated_delta_rule",
        True,
        _shape(1, 4096, 16, 16, 128, 128),
        (_shape(2, 63, 3, 3, 64, 64), _shape(1, 1000, 2, 2, 128, 128), _shape(2, 257, 5, 40, 128, 64), _shape(1, 1, 1, 2, 32, 32)),
    ),
    _operation("gated_delta_rule/grouped", True, _shape(1, 4096, 16, 32, 128, 128), (_shape(2, 257, 2, 4, 128, 128),)),
    _operation("gated_delta_rule/ungated", False, _shape(1, 4096, 16, 16, 128, 128), (_shape(2, 257, 2, 2, 128, 128),)),
)
