"""The C sources beside this file, compiled on first use: a decode step's parts on a CPU, the whole step, the experts
in training, and who may call them.

The library is built by the C compiler that the machine has, for the processor that it has, and kept in the user's cache
folder. Without a compiler, or with HYBRID_MOE_NATIVE=0, the torch forms compute the same.

Legend: T tokens, D model width, I and O the widths of a weight.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from foundation.c_library import Compiled, c_library

# The first one includes the others.
SOURCES = [
    Path(__file__).with_name(f"{name}.c")
    for name in (
        *(
            "library",
            "few_tokens",
            "kept_weights",
            "packed",
            "routing",
            "products",
            "bf16_products",
            "projection",
            "grouped_mlp",
        ),
        *("newton_schulz", "softmax_attention", "softmax_decode", "training_norm_and_loss", "chunked_rule"),
        *("linear_layer", "decode_step", "prompt"),
    )
]
# No flag may reorder sums or drop NaN: the same source gives the same bits with one thread or more.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
NO_MEMORY, OUT_OF_RANGE = -1, -2
# What bf16_products.c says of the processor, beside 0.
THESE_PRODUCTS, OTHER_PRODUCTS = 1, 2
# Beyond so many tokens the experts' weights are read once for several blocks of them anyway.
MOST_TOKENS = 32
# What the parts of linear layers take, all of which sum in fp32.
UP_TO_FP32 = (torch.float32, torch.bfloat16, torch.float16)
# See `torch_by_one_thread`.
MOST_PUT_ASIDE = 4

P, LONG, FLOAT, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[type]] = {
    "rms_norm": [P, P, P, LONG, LONG, FLOAT],
    "rms_norm_rows": [P, P, P, LONG, LONG, FLOAT, INT],
    "linear": [P, LONG, P, P, LONG, LONG, LONG, INT],
    "experts": [*[P] * 9, *[LONG] * 5, INT],
    "packed_experts": [*[P] * 13, *[LONG] * 7, INT],
    "unpack_weight": [*[P] * 4, *[LONG] * 5],
    "sort_slots": [*[P] * 9, *[LONG] * 3],
    "route": [P, P, FLOAT, *[P] * 5, *[LONG] * 4, *[INT] * 4],
    "route_backward": [*[P] * 6, *[LONG] * 3, *[INT] * 3],
    "softmax_decode": [*[P] * 3, *[LONG] * 2, *[P] * 2, *[LONG] * 3, INT, *[P] * 5, *[FLOAT] * 2, *[LONG] * 5, P, INT],
    "delta_decode": [*[P] * 4, *[LONG] * 4, *[P] * 6, *[INT] * 3, FLOAT, *[LONG] * 5, P, INT],
    "lightning_decode": [P, LONG, P, P, P, *[LONG] * 4],
    "decode_step": [P, P, LONG, LONG, P, P, P, P, INT],
    "grouped_mlp_forward": [*[P] * 9, *[LONG] * 5, INT, INT],
    "grouped_mlp_backward": [*[P] * 13, *[LONG] * 4, INT, INT],
    "project_rows": [*[P] * 3, *[LONG] * 3, INT, INT],
    "project_rows_backward": [*[P] * 5, *[LONG] * 3, INT, INT],
    "bf16_products": [],
    "keep_weights": [P, P, *[LONG] * 3, INT, INT],
    "newton_schulz": [P, LONG, P, LONG, FLOAT, INT],
    "head_loss": [*[P] * 6, *[LONG] * 4, INT, INT],
    "convert_bf16": [P, P, LONG, INT, INT],
    "rms_norm_backward": [*[P] * 5, *[LONG] * 2, FLOAT, INT],
    "softmax_forward": [*[P] * 8, FLOAT, P, P, INT, INT, INT],
    "rotate_heads": [*[P] * 6, FLOAT, INT, INT],
    "softmax_backward": [*[P] * 8, FLOAT, *[P] * 7, INT, INT],
    "rule_forward": [*[P] * 8, FLOAT, *[P] * 5, INT],
    "rule_backward": [*[P] * 8, FLOAT, *[P] * 10, INT],
    "conv_forward": [*[P] * 7, INT],
    "conv_backward": [*[P] * 10, INT],
    "gated_norm": [*[P] * 4, FLOAT, P, INT],
    "gated_norm_backward": [*[P] * 4, FLOAT, *[P] * 4, INT],
}
# Rows, or an error below 0; the others return nothing.
RETURNING = (
    *("experts", "packed_experts", "sort_slots", "softmax_decode", "decode_step"),
    *("grouped_mlp_forward", "grouped_mlp_backward", "project_rows", "project_rows_backward", "newton_schulz"),
    *("softmax_forward", "softmax_backward", "head_loss", "rule_forward", "rule_backward"),
    "bf16_products",
)


@functools.cache
def native() -> Compiled:
    """The compiled library, or None and why there is none."""
    signatures = {name: (LONG if name in RETURNING else None, takes) for name, takes in SIGNATURES.items()}
    return c_library(SOURCES, signatures, flags=FLAGS, libraries=["-lm", "-lpthread"])


def is_native(x: Tensor, n_tokens: int, *weights: Tensor) -> bool:
    """Whether so few tokens as x stands for are computed here: on a CPU, in fp32 or bf16 by fp32 weights, outside of
    autograd and compilation."""
    return (
        n_tokens <= MOST_TOKENS
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and native().library is not None
        and all(
            weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and weight.is_contiguous()
            and has_memory(weight)
            for weight in weights
        )
    )


def has_memory(x: Tensor) -> bool:
    """Whether x is a plain tensor: one that is spread over processes, or traced, has no memory of its own to pass."""
    return type(x) in (Tensor, nn.Parameter)


def products_here() -> tuple[torch.dtype, ...]:
    """Of what dtypes large products are computed here: fp32, and bf16 on most processors. Where AVX512-BF16 multiplies
    it, inputs are rounded to it and sums are fp32; where nothing does, products are those of fp32, since torch's own
    take ten times as long there. AMX and ARM multiply bf16 in ways that torch knows, and it keeps them."""
    # A graph that is traced must not look at the processor.
    return UP_TO_FP32[:1] if torch.compiler.is_compiling() or _bf16() == OTHER_PRODUCTS else UP_TO_FP32[:2]


def rounds_products(dtype: torch.dtype) -> bool:
    """Whether products of inputs that are brought to fp32 from this dtype may round them to bf16."""
    return dtype == torch.bfloat16 and _bf16() == THESE_PRODUCTS


@functools.cache
def _bf16() -> int:
    library = native().library
    return OTHER_PRODUCTS if library is None else library.bf16_products()


def takes_many_rows(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether the parts for many rows, which know gradients, take these: fp32 on a CPU, outside of compilation.

    Args:
        dtypes: those that the caller brings to fp32 first.
    """
    return (
        all(x.dtype in dtypes and x.device.type == "cpu" and has_memory(x) for x in tensors)
        and not torch.compiler.is_compiling()
        and native().library is not None
    )


def call(name: str, *arguments: Tensor | float | int | ctypes.Array | None) -> int:
    """One function of the library; what it returns. Tensors are passed as where they lie, None as NULL.

    Raises:
        MemoryError: where there is none.
        ValueError: for an index out of range.
    """
    library = native().library
    assert library is not None
    assert all(has_memory(x) for x in arguments if isinstance(x, Tensor)), name
    result = getattr(library, name)(*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))
    if result == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for its scratch")
    if result == OUT_OF_RANGE:
        raise ValueError(f"{name}: an index out of range")
    return result


def threads() -> int:
    """How many threads the parts in C may use: torch's number, unless `torch_by_one_thread` has put it aside."""
    return torch.get_num_threads() if _put_aside is None else _put_aside


_put_aside: int | None = None


@contextlib.contextmanager
def torch_by_one_thread() -> Iterator[None]:
    """torch's own operators run by one thread, the parts in C by as many as before; for work that is mostly theirs.

    torch's threads wait for each other after every operator. Where something else runs on one of two cores, both wait
    for that: measured, a training step takes five to nine times as long by two threads as by one. The parts in C wait
    for nobody. Bits do not depend on it. Of many cores a neighbour takes few, and one would be too little: nothing
    changes there, nor without a library.
    """
    global _put_aside
    before, outer = torch.get_num_threads(), _put_aside
    if not 1 < before <= MOST_PUT_ASIDE or native().library is None:
        yield
        return
    _put_aside = before
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _put_aside = outer
        torch.set_num_threads(before)


def wide(x: Tensor) -> Tensor:
    """x in fp32 and in one piece."""
    if x.dtype == torch.bfloat16 and _is_long(x):
        y = torch.empty(x.shape)
        call("convert_bf16", x.contiguous(), y, x.numel(), True, threads())
        return y
    return x.to(torch.float32).contiguous()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense x of fp32 in this dtype."""
    if dtype == torch.bfloat16 and _is_long(x):
        y = torch.empty(x.shape, dtype=dtype)
        call("convert_bf16", y, x, x.numel(), False, threads())
        return y
    return x.to(dtype)


def _is_long(x: Tensor) -> bool:
    """Whether the conversion of x is worth more than one thread."""
    return x.numel() >= 2**16 and x.device.type == "cpu" and has_memory(x) and native().library is not None


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T of few tokens in x's dtype; products and sums are fp32 and the fp32 weights are not rounded first."""
    y_TO = torch.empty(len(x_TI), len(weight_OI))
    call("linear", wide(x_TI), x_TI.shape[1], weight_OI, y_TO, *x_TI.shape, len(weight_OI), threads())
    return y_TO.to(x_TI.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis in x's dtype."""
    y = torch.empty(x.shape)
    D = x.shape[-1]
    call("rms_norm", wide(x), weight_D, y, x.numel() // D, D, eps)
    return y.to(x.dtype)
