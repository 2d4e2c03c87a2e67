"""Batched matrix products of the torch forms.

On a CPU torch gives fp32 products to MKL, which runs AVX2 kernels on processors that it does not know (AMD's). oneDNN
runs AVX-512 kernels wherever there are such instructions, and torch takes it for fp32 where it is allowed to round to
bf16 on the way. oneDNN makes use of that only where the processor multiplies tiles (AMX): elsewhere the permission
costs no bit. So it is given here, within a product that is worth it, once trying has shown that nothing is rounded.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Multiplications, in all and of one matrix, from which oneDNN is the faster one: a call of it takes some 10 us more.
LEAST, LEAST_OF_ONE = 1 << 21, 1 << 15
# The permission holds for the whole process.
_lock = threading.Lock()


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b: a [X, M, K], b [X, K, N], out [X, M, N], contiguous, all of one dtype."""
    return _run(torch.bmm, a, b, out=out)


def add_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a @ b, shaped as in `matmul`."""
    return _run(out.baddbmm_, a, b)


def _run(operation: Callable[..., Tensor], a: Tensor, b: Tensor, **options: Any) -> Tensor:
    size = a.shape[1] * a.shape[2] * b.shape[2]
    worth_it = (
        size >= LEAST_OF_ONE and size * a.shape[0] >= LEAST and a.dtype == torch.float32 and a.device.type == "cpu"
    )
    if worth_it and onednn_is_exact():
        return _by_onednn(operation, a, b, **options)
    return operation(a, b, **options)


def _by_onednn(operation: Callable[..., Tensor], *operands: Tensor, **options: Any) -> Tensor:
    # Made when torch is imported, unknown to a type checker.
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore
    with _lock:
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            return operation(*operands, **options)
        finally:
            settings.fp32_precision = before


@cache
def onednn_is_exact() -> bool:
    """oneDNN has AVX-512 kernels here, and leaves fp32 operands as they are where it may round them."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    # Between two bf16 numbers.
    x = torch.full((64, 32, 64), 1 + 2.0**-12)
    return torch.equal(_by_onednn(torch.bmm, x, torch.eye(64).repeat(64, 1, 1)), x)
