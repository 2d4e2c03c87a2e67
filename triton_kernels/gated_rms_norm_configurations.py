"""The gated norm's entries for inspect, bench and gpu-check.

Letters: B batch, T tokens, H heads, D width of the norm.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.configurations import Cost, Operation, random_inputs
from triton_kernels.gated_rms_norm import gated_rms_norm


def _inputs(dtype: torch.dtype, device: str, *, B: int, T: int, H: int, D: int, **_: int) -> dict[str, Any]:
    return random_inputs(0, dtype, device, {"x": (B, T, H, D), "gate": (B, T, H, D), "weight": (D,)})


def _cost(element_size: int, *, B: int, T: int, H: int, D: int, **_: int) -> tuple[Cost, Cost]:
    elements = B * T * H * D
    return Cost(flops=12 * elements, bytes=3 * element_size * elements), Cost(flops=30 * elements, bytes=5 * element_size * elements)


OPERATIONS = (
    Operation(
        name="gated_rms_norm",
        call=partial(gated_rms_norm, eps=1e-6),
        inputs=_inputs,
        cost=_cost,
        inspect_shape={"B": 1, "T": 4096, "H": 16, "D": 128},
        check_shapes=tuple({"B": 2, "T": T, "H": 3, "D": D} for T, D in ((1, 64), (63, 100), (257, 128), (100, 2048))),
        bench_shapes=({"B": 4, "T": 4096, "H": 16, "D": 128}, {"B": 1, "T": 4096, "H": 1, "D": 4096}),
        cpu_shape={"B": 2, "T": 2048, "H": 8, "D": 64},
        peers={"fla": peers.fla_norm, "torch rms_norm": peers.torch_norm},
        cpu_peers={"torch rms_norm": peers.torch_norm},
        without_products=frozenset({"norm_forward_kernel", "norm_backward_kernel"}),
    ),
)
