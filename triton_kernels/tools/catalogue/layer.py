"""causal_conv1d, gated_rms_norm and linear_decode as inspect, bench and gpu-check know them. All are bound by memory:
no products, no tables.

Legend: B batch, T tokens, H heads, D channels or width of the norm, K key width, V value width, W convolution width, X
channels of q, k and v.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.linear_decode import delta_decode, lightning_decode
from triton_kernels.tools import peers
from triton_kernels.tools.catalogue.linear import lightning_slopes
from triton_kernels.tools.operations import Cost, Operation, random_inputs


def _conv_inputs(dtype: torch.dtype, device: str, **sizes: int) -> dict[str, Any]:
    """The tail lies as the kernels read it, and as a call without one makes it: the channels side by side."""
    tail_BRD = random_inputs(1, dtype, device, sizes | {"R": sizes["W"] - 1}, "tail_BRD")["tail_BRD"].detach()
    return random_inputs(0, dtype, device, sizes, "x_BTD", "weight_DW", "bias_D") | {
        "initial_tail": tail_BRD.transpose(1, 2).requires_grad_()
    }


def _conv_cost(element_size: int, *, B: int, T: int, D: int, W: int) -> tuple[Cost, Cost]:
    elements = B * T * D
    forward = Cost(flops=elements * (2 * W + 5), bytes=2 * element_size * elements)
    return forward, Cost(flops=elements * (6 * W + 10), bytes=3 * element_size * elements)


def _norm_inputs(dtype: torch.dtype, device: str, **sizes: int) -> dict[str, Any]:
    drawn = random_inputs(0, dtype, device, sizes, "x_BTHD", "gate_BTHD", "weight_D")
    return dict(zip(("x", "gate", "weight"), drawn.values()))


def _norm_cost(element_size: int, *, B: int, T: int, H: int, D: int) -> tuple[Cost, Cost]:
    elements = B * T * H * D
    return Cost(flops=12 * elements, bytes=3 * element_size * elements), Cost(
        flops=30 * elements, bytes=5 * element_size * elements
    )


def _decode_inputs(dtype: torch.dtype, device: str, *, per_channel: bool | None, **sizes: int) -> dict[str, Any]:
    """per_channel: whether a delta layer's decay is; None for lightning, which reads no more than its projection and
    its decays."""
    H, K, V = (sizes[letter] for letter in "HKV")
    sizes |= {"X": H * (2 * K + V), "C": H * K if per_channel else H}
    drawn = random_inputs(0, dtype, device, sizes, "qkv_BX") | random_inputs(
        1, torch.float32, device, sizes, "state_BHKV"
    )
    if per_channel is None:
        drawn["log_decay_H"] = lightning_slopes(H, device)
    else:
        drawn |= random_inputs(2, dtype, device, sizes | {"W": sizes["W"] - 1}, "gate_BHV", "a_BC", "b_BH", "tail_BXW")
        drawn |= random_inputs(3, torch.float32, device, sizes, "conv_XW", "A_log_H", "dt_bias_C", "norm_V")
    return {name.removesuffix("_BC").removesuffix("_C"): x.detach() for name, x in drawn.items()}


def _decode_cost(
    element_size: int, *, per_channel: bool | None, B: int, H: int, K: int, V: int, W: int = 1
) -> tuple[Cost, None]:
    """The state and the tail read and written; the other inputs and the output once."""
    if per_channel is None:
        return Cost(flops=5 * B * H * K * V, bytes=8 * B * H * K * V + element_size * 2 * B * H * (K + V) + 4 * H), None
    X, channels = H * (2 * K + V), H * K if per_channel else H
    activations = B * (X * (1 + 2 * (W - 1)) + 2 * H * V + channels + H)
    return Cost(
        flops=8 * B * H * K * V, bytes=8 * B * H * K * V + element_size * activations + 4 * (X * W + H + channels + V)
    ), None


def _with_memory(decode: Any, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what was updated in place: gpu-check compares all of them."""
    return decode(**inputs), *(inputs[name] for name in ("state_BHKV", "tail_BXW") if name in inputs)


def _decode(name: str, decode: Any, per_channel: bool | None, **more: int) -> Operation:
    shape = {"B": 8, "H": 16, "K": 128, "V": 128, **more}
    return Operation(
        name=f"linear_decode/{name}",
        call=partial(_with_memory, decode),
        inputs=partial(_decode_inputs, per_channel=per_channel),
        cost=partial(_decode_cost, per_channel=per_channel),
        inspect_shape=shape,
        check_shapes=tuple(
            {**shape, "B": 3, "H": 3, "K": K, "V": V} for K, V in ((32, 32), (64, 128), (100, 48), (256, 256))
        ),
        bench_shapes=tuple({**shape, "B": B} for B in (1, 8, 64)),
        cpu_shapes=({**shape, "H": 8, "K": 64, "V": 64},),
        without_products=frozenset({"delta_decode_kernel", "lightning_decode_kernel"}),
    )


OPERATIONS = (
    Operation(
        name="causal_conv1d",
        call=causal_conv1d,
        inputs=_conv_inputs,
        cost=_conv_cost,
        inspect_shape={"B": 1, "T": 4096, "D": 2048, "W": 4},
        check_shapes=tuple(
            {"B": 2, "T": T, "D": D, "W": W}
            for T, D, W in ((1, 64, 4), (63, 100, 2), (257, 256, 3), (100, 130, 8), (1000, 512, 4))
        ),
        bench_shapes=({"B": 4, "T": 4096, "D": 2048, "W": 4}, {"B": 1, "T": 32768, "D": 2048, "W": 4}),
        cpu_shapes=({"B": 2, "T": 2048, "D": 512, "W": 4},),
        peers={"fla": peers.fla_conv1d, "torch conv1d": peers.torch_conv1d},
        cpu_peers={"torch conv1d": peers.torch_conv1d},
        without_products=frozenset({"convolution_forward_kernel", "convolution_backward_kernel"}),
    ),
    Operation(
        name="gated_rms_norm",
        call=partial(gated_rms_norm, eps=1e-6),
        inputs=_norm_inputs,
        cost=_norm_cost,
        inspect_shape={"B": 1, "T": 4096, "H": 16, "D": 128},
        check_shapes=tuple({"B": 2, "T": T, "H": 3, "D": D} for T, D in ((1, 64), (63, 100), (257, 128), (100, 2048))),
        bench_shapes=({"B": 4, "T": 4096, "H": 16, "D": 128}, {"B": 1, "T": 4096, "H": 1, "D": 4096}),
        cpu_shapes=({"B": 2, "T": 2048, "H": 8, "D": 64},),
        peers={"fla": peers.fla_norm, "torch rms_norm": peers.torch_norm},
        cpu_peers={"torch rms_norm": peers.torch_norm},
        without_products=frozenset({"norm_kernel"}),
    ),
    _decode("gated_delta_net", partial(delta_decode, eps=1e-5, activation="silu"), False, W=4),
    _decode("kimi_delta_attention", partial(delta_decode, eps=1e-5, activation="sigmoid"), True, W=4),
    _decode("lightning", lightning_decode, None),
)
