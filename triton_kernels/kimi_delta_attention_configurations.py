"""Kimi delta attention as data: launch tables, what it costs at least, the shapes it is inspected, checked and timed at, and its peers.

Letters: B batch, T tokens, G query/key heads, H value heads, K key width, V value width.
"""

from typing import Any

import torch

from triton_kernels.configurations import Cost, Operation, random_inputs
from triton_kernels.delta_launch import Tables, everywhere, slices
from triton_kernels.kimi_delta_attention import kimi_delta_attention

SINGLE_SCAN = everywhere(slices(16, warps=4, stages=1))
PREPARE: Tables = (everywhere(slices(32, warps=8, stages=1)), everywhere(slices(32, warps=8, stages=1)))
SCAN_FORWARD: Tables = (everywhere(slices(32, 16, warps=4, stages=2)), SINGLE_SCAN)
SCAN_BACKWARD: Tables = (
    everywhere(slices(32, 16, warps=4, stages=2), sm_80=slices(16, warps=4, stages=1), sm_100=slices(16, warps=8, stages=2)),
    SINGLE_SCAN,
)
GRADIENTS: Tables = (everywhere(slices(64, warps=8, stages=1)), everywhere(slices(32, warps=8, stages=1)))

# Channels of one program of the gradients, and rows of one that finishes them.
CHANNELS = 32
FINISH_ROWS = 32


def _inputs(dtype: torch.dtype, device: str, *, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Any]:
    shapes = {"q_BTGK": (B, T, G, K), "k_BTGK": (B, T, G, K), "v_BTHV": (B, T, H, V)}
    tensors: dict[str, Any] = dict(random_inputs(T, dtype, device, shapes))
    raw = random_inputs(T + 1, torch.float32, device, {"g": (B, T, H, K), "beta": (B, T, H)})
    tensors["log_decay_BTHK"] = -raw["g"].detach().abs().requires_grad_()
    tensors["beta_BTH"] = raw["beta"].detach().sigmoid().requires_grad_()
    return tensors | {"normalize_qk": True}


def _cost(element_size: int, *, B: int, T: int, G: int, H: int, K: int, V: int) -> tuple[Cost, Cost]:
    """As for the gated delta rule, with an fp32 log-decay for every key channel."""
    C, rows, group = 64, B * T * H, H // G
    forward_flops = 2 * rows * (2 * C * K + 2 * C * V + 3 * K * V + C * C / 3)
    backward_flops = 2 * rows * (6 * C * K + 4 * C * V + 8 * K * V)
    forward = rows * (element_size * (2 * K / group + 2 * V) + 4 * (K + 1))
    backward = rows * (element_size * (4 * K / group + 3 * V) + 8 * (K + 1))
    return Cost(flops=forward_flops, bytes=forward), Cost(flops=backward_flops, bytes=backward)


def _fla(
    q_BTGK: torch.Tensor, k_BTGK: torch.Tensor, v_BTHV: torch.Tensor, log_decay_BTHK: torch.Tensor, beta_BTH: torch.Tensor, normalize_qk: bool
) -> torch.Tensor:
    from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]

    return chunk_kda(q_BTGK, k_BTGK, v_BTHV, g=log_decay_BTHK, beta=beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]


def _shape(B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, int]:
    return {"B": B, "T": T, "G": G, "H": H, "K": K, "V": V}


OPERATIONS = (
    Operation(
        name="kimi_delta_attention",
        call=kimi_delta_attention,
        inputs=_inputs,
        cost=_cost,
        inspect_shape=_shape(1, 4096, 16, 16, 128, 128),
        check_shapes=(_shape(2, 63, 3, 3, 64, 64), _shape(1, 1000, 2, 4, 128, 128), _shape(2, 257, 5, 40, 128, 64), _shape(1, 1, 1, 2, 32, 32)),
        bench_shapes=(_shape(1, 4096, 16, 16, 128, 128), _shape(4, 4096, 16, 16, 128, 128), _shape(1, 32768, 16, 16, 128, 128)),
        cpu_shape=_shape(1, 2048, 8, 8, 64, 64),
        peers={"fla": _fla},
        without_products=frozenset({"finish_kernel"}),
    ),
)
