"""Who computes the experts: every way there is, why one cannot run somewhere, and which one `auto` takes.

Legend: T tokens, D model width, E experts, F expert width, F2 = 2F.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe.cpu_experts import experts_on_cpu
from moe.grouped_products import experts_by_gmm, experts_by_grouped_mm, why_not_gmm, why_not_grouped_mm
from moe.measured import Compute, class_of, fastest
from routing.assignments import Assignments
from triton_kernels.experts.grouped_mlp import check_grouped_mlp, grouped_mlp, why_not_triton
from triton_kernels.experts.native import why_not_native
from triton_kernels.native.library import native


class Choice(NamedTuple):
    """A backend and why it was chosen, for people to read."""

    name: str
    reason: str


class Backend(NamedTuple):
    """One way to compute the experts.

    Attributes:
        compute: (x_TD, w_gate_up_EDF2, w_down_EFD, rows) -> y_TD, see `compute_experts`.
        why_not: (x_TD, w_down_EFD) -> why it cannot run on these tensors, or None.
    """

    compute: Compute
    why_not: Callable[[Tensor, Tensor], str | None]


def _kernel_op(x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, rows: Assignments, *, backend: str) -> Tensor:
    return grouped_mlp(
        x_TD,
        w_gate_up_EDF2,
        w_down_EFD,
        token_N=rows.token_N,
        weight_N=rows.weight_N,
        expert_offsets=rows.expert_offsets,
        token_offsets=rows.token_offsets,
        row_of_slot_N=rows.row_of_slot_N,
        backend=backend,
    )


def _why_not_cpu(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    return None if x_TD.device.type == "cpu" else f"it needs tensors on the CPU, these are on {x_TD.device}"


BACKENDS = {
    "reference": Backend(partial(_kernel_op, backend="torch"), lambda x_TD, w_down_EFD: None),
    "native": Backend(partial(_kernel_op, backend="native"), why_not_native),
    "cpu": Backend(experts_on_cpu, _why_not_cpu),
    "grouped_mm": Backend(experts_by_grouped_mm, why_not_grouped_mm),
    "triton": Backend(partial(_kernel_op, backend="triton"), why_not_triton),
    "megablocks": Backend(experts_by_gmm, why_not_gmm),
}


def choose_backend(x_TD: Tensor, w_down_EFD: Tensor, backend: str = "auto", *, n_rows: int | None = None) -> Choice:
    """The one place that decides what computes the experts.

    Args:
        x_TD: for its dtype and device.
        w_down_EFD: for its widths.
        backend: "auto" or a name in BACKENDS.
        n_rows: how many rows it is to compute. Where they are many, `auto` takes on a CPU what is measured to be the
            fastest, see `moe.measured`.

    Raises:
        ValueError: if the backend asked for is unknown or cannot run here.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend = {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        if (obstacle := BACKENDS[backend].why_not(x_TD, w_down_EFD)) is not None:
            raise ValueError(f"backend = {backend!r} cannot run: {obstacle}")
        return Choice(backend, "asked for")
    if x_TD.device.type == "cpu":
        without_native = why_not_native(x_TD, w_down_EFD)
        usual = Choice("cpu", without_native) if without_native else Choice("native", native().reason)
        # Without the library the torch forms are to give on every machine what they are recorded to give.
        if n_rows is None or native().library is None or torch.compiler.is_compiling():
            return usual
        shape = class_of(x_TD, w_down_EFD, n_rows)
        return usual if shape is None else Choice(*fastest(shape, usual.name, _cpu_ways(x_TD, w_down_EFD)))
    without_triton = why_not_triton(x_TD, w_down_EFD)
    if x_TD.is_cuda and without_triton is None:
        return Choice("triton", "tensors are on a CUDA device")
    if (obstacle := why_not_grouped_mm(x_TD, w_down_EFD)) is None:
        return Choice("grouped_mm", without_triton or f"the fastest one here that runs on {x_TD.device.type}")
    return Choice("reference", obstacle)


def _cpu_ways(x_TD: Tensor, w_down_EFD: Tensor) -> tuple[tuple[str, Compute], ...]:
    return tuple(
        (name, BACKENDS[name].compute)
        for name in ("native", "cpu", "grouped_mm")
        if BACKENDS[name].why_not(x_TD, w_down_EFD) is None
    )


def compute_experts(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, rows: Assignments, *, backend: str = "auto"
) -> Tensor:
    """y_t = sum over the rows n of token t of weight_n * W_down^T (SiLU(W_gate^T x_t) * (W_up^T x_t)), with the weights
    of expert_n.

    Args:
        x_TD: [T, D] floating point; products run in its dtype, sums over a token's rows in fp32 or better.
        w_gate_up_EDF2: [E, D, 2F], the gate's columns first; another dtype than x's is cast on the way in.
        w_down_EFD: [E, F, D].
        backend: "auto" or a name in BACKENDS, see `choose_backend`.

    Returns:
        y_TD [T, D] in x's dtype. Differentiable in x, both weights and rows.weight_N.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    chosen = choose_backend(x_TD, w_down_EFD, backend, n_rows=len(rows.token_N)).name
    # Those that are `grouped_mlp` check for themselves.
    if chosen not in ("reference", "triton", "native"):
        check_grouped_mlp(
            x_TD,
            w_gate_up_EDF2,
            w_down_EFD,
            token_N=rows.token_N,
            weight_N=rows.weight_N,
            expert_offsets=rows.expert_offsets,
            token_offsets=rows.token_offsets,
            row_of_slot_N=rows.row_of_slot_N,
        )
    return BACKENDS[chosen].compute(x_TD, w_gate_up_EDF2, w_down_EFD, rows)
