"""Block sizes of the causal convolution, and the op's entries for inspect, bench and gpu-check.

Letters: B batch, T tokens, D channels, W convolution width.
"""

from typing import Any

import torch

from triton_kernels import peers
from triton_kernels.causal_conv1d import causal_conv1d
from triton_kernels.configurations import Cost, Operation, random_inputs

# Tokens and channels of a program: 16 elements per thread at 4 warps forward; the backward holds more of them at once and takes half as many.
BLOCK_M = 16
BACKWARD_BLOCK_M = 8
BLOCK_C = 128


def _inputs(dtype: torch.dtype, device: str, *, B: int, T: int, D: int, W: int, **_: int) -> dict[str, Any]:
    return random_inputs(0, dtype, device, {"x_BTD": (B, T, D), "weight_DW": (D, W), "bias_D": (D,), "initial_tail": (B, D, W - 1)})


def _cost(element_size: int, *, B: int, T: int, D: int, W: int, **_: int) -> tuple[Cost, Cost]:
    elements = B * T * D
    forward = Cost(flops=elements * (2 * W + 5), bytes=2 * element_size * elements)
    return forward, Cost(flops=elements * (6 * W + 10), bytes=3 * element_size * elements)


OPERATIONS = (
    Operation(
        name="causal_conv1d",
        call=causal_conv1d,
        inputs=_inputs,
        cost=_cost,
        inspect_shape={"B": 1, "T": 4096, "D": 2048, "W": 4},
        check_shapes=tuple({"B": 2, "T": T, "D": D, "W": W} for T, D, W in ((1, 64, 4), (63, 100, 2), (257, 256, 3), (1000, 512, 4))),
        bench_shapes=({"B": 4, "T": 4096, "D": 2048, "W": 4}, {"B": 1, "T": 32768, "D": 2048, "W": 4}),
        cpu_shape={"B": 2, "T": 2048, "D": 512, "W": 4},
        peers={"fla": peers.fla_conv1d, "torch conv1d": peers.torch_conv1d},
        cpu_peers={"torch conv1d": peers.torch_conv1d},
        without_products=frozenset({"convolution_forward_kernel", "convolution_backward_kernel", "convolution_tail_kernel"}),
    ),
)
