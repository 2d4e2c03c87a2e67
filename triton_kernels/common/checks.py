"""Refusals every sequence op shares: shapes, dtypes and offsets that are wrong are named before any kernel sees them.

Legend: B batch, T tokens, H heads, K key width, V value width, S packed sequences.
"""

import math
import re
from itertools import pairwise

import torch
import torch.autograd.forward_ad as fwAD

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
# The dtypes of the arguments that are no numbers; all others are floating.
WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
DTYPES = {
    "cu_seqlens": (torch.int64,),
    "lengths_B": (torch.int64,),
    "block_table_BN": (torch.int64, torch.int32),
    "token_N": (torch.int64,),
    "row_of_slot_N": (torch.int64,),
    "expert_offsets": (torch.int64,),
    "token_offsets": (torch.int64,),
    "expert_TK": WHOLE,
    "keep_TK": (torch.bool,),
    "k_cache": (*FLOATS, *QUANTISED),
    "v_cache": (*FLOATS, *QUANTISED),
}


def check_backend(backend: str, x: torch.Tensor, *, native: bool | None = None) -> str:
    """Resolve "auto": the Triton kernels on CUDA tensors, the torch reference everywhere else, but for few tokens on a
    CPU where the op has a native form.

    Args:
        native: whether the op's native form takes these tensors (`native.library.is_native`); None: it has none.

    "triton" on CPU tensors is for Triton's interpreter and for the offline compiler; elsewhere Triton itself reports
    that it has no driver."""
    names = ("auto", "torch", "triton") if native is None else ("auto", "torch", "triton", "native")
    if backend not in names:
        raise ValueError(f"backend={backend!r}: legal are {', '.join(map(repr, names[:-1]))} and {names[-1]!r}")
    if backend == "native" and not native:
        raise ValueError(
            "backend='native' takes few tokens of float32 or bfloat16 on a CPU, with float32 weights and without"
            " gradients, or float32 experts, where a C compiler is found"
        )
    if backend == "auto":
        return "triton" if x.is_cuda else "native" if native else "torch"
    return backend


def check_shape(op: str, name: str, x: torch.Tensor, expected: dict[str, int | None]) -> None:
    """expected: axis letter -> size, None where any size will do."""
    layout = "[" + ", ".join(letter if size is None else f"{letter}={size}" for letter, size in expected.items()) + "]"
    if x.dim() != len(expected) or any(
        size is not None and size != have for size, have in zip(expected.values(), x.shape)
    ):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, expected {layout}")


def axes_of(name: str) -> list[str]:
    """The axes that the name of a tensor ends in: k_BSGK has B, S, G and K, w_EDF2 has E, D and F2."""
    return re.findall(r"[A-Z]\d*", name.rsplit("_", 1)[-1])


def check_tensors(op: str, sizes: dict[str, int] | None = None, **tensors: torch.Tensor | None) -> dict[str, int]:
    """Every tensor has the axes its name ends in, a letter being one size throughout: that of `sizes`, or of the first
    tensor it occurs in. Tensors that are None are passed over. Returns all sizes by letter."""
    sizes = dict(sizes or {})
    for name, x in tensors.items():
        if x is not None:
            check_shape(op, name, x, {axis: sizes.get(axis) for axis in axes_of(name)})
            sizes |= dict(zip(axes_of(name), x.shape))
    return sizes


def check_dtype(op: str, tensors: dict[str, torch.Tensor]) -> None:
    """All tensors share one floating dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in FLOATS:
        raise ValueError(f"{op}: {first_name} is {first.dtype}, legal are {', '.join(str(d) for d in FLOATS)}")
    for name, x in tensors.items():
        if x.dtype != first.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype} but {first_name} is {first.dtype}; they must be the same")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device} but {first_name} is on {first.device}")


def check_placed(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors of a call, by argument: on the device of the first, in a dtype that the argument may have, and
    without tangents. Those that are None are passed over."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        legal = DTYPES.get(name, FLOATS)
        if x.dtype not in legal:
            raise ValueError(f"{op}: {name} is {x.dtype}, legal are {', '.join(map(str, legal))}")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device} but {first_name} is on {first.device}")
        # Forward-mode differentiation passes an operator by, and gives 0 without a word.
        if not torch.compiler.is_compiling() and fwAD._current_level >= 0 and fwAD.unpack_dual(x).tangent is not None:
            raise ValueError(f"{op}: {name} carries a tangent (torch.func.jvp, jacfwd); legal is reverse mode only")


def check_number(op: str, name: str, x: float | None, *, least: float = -math.inf) -> None:
    """A finite number, or None; `least` is the smallest legal one."""
    if x is not None and not (math.isfinite(x) and x >= least):
        above = "" if least == -math.inf else f" and at least {least}"
        raise ValueError(f"{op}: {name}={x}; it must be finite{above}")


def check_range(
    op: str, name: str, x: torch.Tensor, least: float, most: float | torch.Tensor, where: torch.Tensor | None = None
) -> None:
    """Refuses values outside [least, most], of those that `where` marks. NaN is no such value: it stays NaN in what is
    computed. On a GPU only indices are looked at: what else is out of range gives wrong numbers there, not memory of
    another tensor."""
    if x.numel() == 0 or not values_are_checked(x) or not (values_are_free(x) or x.dtype in WHOLE):
        return
    wrong = (x < least) | (x > most)
    wrong = wrong if where is None else wrong & where
    if not values_are_free(x):
        refuse_on_device(op, f"{name} holds values outside of the legal ones", ~wrong.any())
    elif bool(wrong.any()):
        most = most.item() if isinstance(most, torch.Tensor) else most
        raise ValueError(f"{op}: {name} holds {x[wrong][0].item()}, legal are {least} to {most}")


def check_offsets(op: str, name: str, x: torch.Tensor, most: int) -> None:
    """Offsets from 0 on that never fall and end at `most` at the latest."""
    if not values_are_checked(x):
        return
    right = (x[0] == 0) & (x[-1] <= most) & (x.diff() >= 0).all()
    if not values_are_free(x):
        refuse_on_device(op, f"{name} must start at 0 and never fall, nor exceed {most}", right)
    elif not bool(right):
        raise ValueError(f"{op}: {name} must start at 0 and never fall, nor exceed {most}, got {x.tolist()}")


def refuse_on_device(op: str, message: str, right: torch.Tensor) -> None:
    """Stops the device where `right` is not so, once it comes by: the host neither waits nor hears of it before it asks
    for a result."""
    torch.ops.aten._assert_async.msg(right, f"{op}: {message}")


def values_are_checked(x: torch.Tensor) -> bool:
    """Whether there are values to be checked, by the host or by the device they lie on. The offline recorder, whose CPU
    tensors stand for a GPU's, sees neither."""
    return values_are_free(x) or x.is_cuda


def values_are_free(x: torch.Tensor) -> bool:
    """Whether the host may look at values: on a CPU only, for reading them from a GPU would make it wait; nor while
    compiling, where there are none yet."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor | None, batch: int, tokens: int) -> None:
    """Packed sequences: int64 offsets [S+1] from 0 to T, never falling, with one batch row."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be int64 [S+1] with S >= 1, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{op}: with cu_seqlens the sequences are packed into one row, so B must be 1, got B={batch}")
    if not values_are_checked(cu_seqlens):
        return
    if not values_are_free(cu_seqlens):
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        refuse_on_device(op, f"cu_seqlens must rise from 0 to T={tokens}", right)
    else:
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != tokens or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(f"{op}: cu_seqlens must rise from 0 to T={tokens}, got {offsets}")
