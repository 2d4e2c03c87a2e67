"""Launch options of the linear decode kernels, and their entries for inspect, bench and gpu-check.

Letters: B sequences, H heads, K key width, V value width, W convolution width.
"""

from functools import partial
from typing import Any

import torch

from triton_kernels.configurations import Cost, Operation, Shape, random_inputs
from triton_kernels.linear_decode import delta_decode, lightning_decode

# Value columns of a program where no norm ties a head's columns together: narrow enough that 16 heads of one sequence are 128 programs.
LIGHTNING_BLOCK = 16


# Entries of the state that a program holds at once.
PROGRAM_ENTRIES = 128 * 128


def tiles(key_width: int, value_width: int, widest: int = PROGRAM_ENTRIES) -> dict[str, int]:
    """Constants of a launch over heads of these widths, in blocks of at most `widest` value columns."""
    block_k = 1 << (key_width - 1).bit_length()
    block_v = min(1 << (value_width - 1).bit_length(), PROGRAM_ENTRIES // block_k, widest)
    # 128 entries per thread: two programs of 128 x 128 then share a processor. Wider keys leave room for half as many.
    warps = max(1, block_k * block_v // (32 * (128 if block_k <= 128 else 64)))
    return {"K": key_width, "V": value_width, "BLOCK_K": block_k, "BLOCK_V": block_v, "num_warps": warps}


def _delta_inputs(dtype: torch.dtype, device: str, *, B: int, H: int, K: int, V: int, W: int, per_channel: bool) -> dict[str, Any]:
    X, channels = H * (2 * K + V), H * K if per_channel else H
    projections = {"qkv_BX": (B, X), "gate_BHV": (B, H, V), "a": (B, channels), "b_BH": (B, H), "tail_BXW": (B, X, W - 1)}
    weights = {"conv_XW": (X, W), "A_log_H": (H,), "dt_bias": (channels,), "norm_V": (V,), "state_BHKV": (B, H, K, V)}
    inputs = random_inputs(0, dtype, device, projections) | random_inputs(1, torch.float32, device, weights)
    return {name: x.detach() for name, x in inputs.items()}


def _lightning_inputs(dtype: torch.dtype, device: str, *, B: int, H: int, K: int, V: int) -> dict[str, Any]:
    inputs = random_inputs(0, dtype, device, {"qkv_BX": (B, H * (2 * K + V))}) | random_inputs(1, torch.float32, device, {"state_BHKV": (B, H, K, V)})
    slopes = 2.0 ** (-8 * (torch.arange(H, device=device) + 1) / H)
    return {name: x.detach() for name, x in inputs.items()} | {"log_decay_H": -slopes}


def _delta_cost(element_size: int, *, per_channel: bool, B: int, H: int, K: int, V: int, W: int) -> tuple[Cost, None]:
    """The state and the tail read and written; the other inputs and the output once."""
    X, channels = H * (2 * K + V), H * K if per_channel else H
    activations = B * (X * (1 + 2 * (W - 1)) + 2 * H * V + channels + H)
    return Cost(flops=8 * B * H * K * V, bytes=8 * B * H * K * V + element_size * activations + 4 * (X * W + H + channels + V)), None


def _lightning_cost(element_size: int, *, B: int, H: int, K: int, V: int) -> tuple[Cost, None]:
    return Cost(flops=5 * B * H * K * V, bytes=8 * B * H * K * V + element_size * 2 * B * H * (K + V) + 4 * H), None


def _with_memory(decode: Any, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what was updated in place: gpu-check compares all of them."""
    return decode(**inputs), *(inputs[name] for name in ("state_BHKV", "tail_BXW") if name in inputs)


def _operation(name: str, decode: Any, draw: Any, least: Any, **more: int) -> Operation:
    shape: Shape = {"B": 8, "H": 16, "K": 128, "V": 128, **more}
    return Operation(
        name=f"linear_decode/{name}",
        call=partial(_with_memory, decode),
        inputs=draw,
        cost=least,
        inspect_shape=shape,
        check_shapes=tuple({**shape, "B": 3, "H": 3, "K": K, "V": V} for K, V in ((32, 32), (64, 128), (100, 48), (256, 256))),
        bench_shapes=tuple({**shape, "B": B} for B in (1, 8, 64)),
        cpu_shape={**shape, "H": 8, "K": 64, "V": 64},
        # Memory bound: products of a vector with a state that is read once.
        without_products=frozenset({"delta_decode_kernel", "lightning_decode_kernel"}),
    )


def _delta(name: str, activation: str, per_channel: bool) -> Operation:
    decode = partial(delta_decode, eps=1e-5, activation=activation)
    return _operation(name, decode, partial(_delta_inputs, per_channel=per_channel), partial(_delta_cost, per_channel=per_channel), W=4)


OPERATIONS = (
    _delta("gated_delta_net", "silu", False),
    _delta("kimi_delta_attention", "sigmoid", True),
    _operation("lightning", lightning_decode, _lightning_inputs, _lightning_cost),
)
