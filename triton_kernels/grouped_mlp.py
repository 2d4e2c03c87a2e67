"""Grouped gated MLP: every expert's SwiGLU network on the rows assigned to it, weighted and added up per token.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.grouped_mlp_cpu import grouped_mlp_cpu
from triton_kernels.grouped_mlp_grouped_mm import grouped_mlp_grouped_mm, why_not
from triton_kernels.grouped_mlp_megablocks import grouped_mlp_megablocks, why_not_megablocks
from triton_kernels.grouped_mlp_torch import grouped_mlp_reference

BACKENDS = ("auto", "reference", "cpu", "grouped_mm", "triton", "megablocks")

# Triton's, which is imported late, is not among them.
IMPLEMENTATIONS = {
    "cpu": grouped_mlp_cpu,
    "grouped_mm": grouped_mlp_grouped_mm,
    "megablocks": grouped_mlp_megablocks,
    "reference": grouped_mlp_reference,
}


class Choice(NamedTuple):
    """A backend and why it was chosen, for people to read."""

    name: str
    reason: str


def choose_backend(x_TD: Tensor, w_down_EFD: Tensor, backend: str = "auto") -> Choice:
    """The one place that decides which implementation computes `grouped_mlp`. Raises ValueError if the one asked for cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not one of {', '.join(BACKENDS)}")
    on_cpu, obstacle, without_triton = x_TD.device.type == "cpu", why_not(x_TD, w_down_EFD), why_not_triton(x_TD, w_down_EFD)
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"backend = 'cpu' needs tensors on the CPU, these are on {x_TD.device}")
    if backend == "grouped_mm" and obstacle is not None:
        raise ValueError(f"backend = 'grouped_mm' cannot run: {obstacle}")
    if backend == "triton" and without_triton is not None:
        raise ValueError(f"backend = 'triton' cannot run: {without_triton}")
    if backend == "megablocks" and (lacking := why_not_megablocks(x_TD)) is not None:
        raise ValueError(f"backend = 'megablocks' cannot run: {lacking}")
    if backend != "auto":
        return Choice(backend, "asked for")
    if on_cpu:
        return Choice("cpu", "tensors are on the CPU")
    if x_TD.is_cuda and without_triton is None:
        return Choice("triton", "tensors are on a CUDA device")
    if obstacle is None:
        return Choice("grouped_mm", without_triton or f"the fastest one here that runs on {x_TD.device.type}")
    return Choice("reference", obstacle)


def why_not_triton(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why the Triton kernels cannot run on these tensors, or None. On the CPU they run in Triton's interpreter only."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels do not take {x_TD.dtype}"
    if any(width % 16 for width in w_down_EFD.shape[1:]):
        return f"the Triton kernels need widths that are multiples of 16, got {tuple(w_down_EFD.shape[1:])}"
    return None


def grouped_mlp(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """y_t = sum over the rows n of token t of weight_n * W_down^T (SiLU(W_gate^T x_t) * (W_up^T x_t)), with the weights of expert_n.

    x_TD             [T, D] floating point; products run in its dtype, sums over a token's rows in fp32 or better
    w_gate_up_EDF2   [E, D, 2F], the gate's columns first; another dtype than x's is cast on the way in
    w_down_EFD       [E, F, D]
    token_N          [N] int64; weight_N [N] floating point; expert_offsets [E+1], token_offsets [T+1], row_of_slot_N [N]: the fields of
                     `routing.assignments.Assignments`, rows sorted by expert, padding behind expert_offsets[E] ignored

    Returns y_TD [T, D] in x's dtype. Differentiable in x, both weights and weight_N. Raises ValueError for shapes that do not fit together.
    """
    chosen = choose_backend(x_TD, w_down_EFD, backend).name
    tensors = (x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, expert_offsets, token_offsets, row_of_slot_N)
    _check(*tensors, look=x_TD.device.type == "cpu" and chosen != "triton")
    if chosen == "triton":
        # Imported here because machines without Triton (macOS) still have the other backends.
        from triton_kernels.grouped_mlp_triton import grouped_mlp_triton

        return grouped_mlp_triton(*tensors)
    return IMPLEMENTATIONS[chosen](x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, expert_offsets)


def _check(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
    *,
    look: bool,
) -> None:
    """Refuse shapes that do not fit and, where looking is free, offsets that would read past the rows."""
    if x_TD.dim() != 2 or w_gate_up_EDF2.dim() != 3 or w_down_EFD.dim() != 3:
        raise ValueError(
            f"x, w_gate_up, w_down must be [T, D], [E, D, 2F], [E, F, D], got {[tuple(t.shape) for t in (x_TD, w_gate_up_EDF2, w_down_EFD)]}"
        )
    (n_tokens, d_model), (n_experts, d_expert, _) = x_TD.shape, w_down_EFD.shape
    expected = {
        "w_gate_up": (w_gate_up_EDF2, (n_experts, d_model, 2 * d_expert)),
        "w_down": (w_down_EFD, (n_experts, d_expert, d_model)),
        "weight": (weight_N, tuple(token_N.shape)),
        "expert_offsets": (expert_offsets, (n_experts + 1,)),
        "token_offsets": (token_offsets, (n_tokens + 1,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape} (x is {tuple(x_TD.shape)})")
    if look:
        last_row, last_slot = int(expert_offsets[-1]), int(token_offsets[-1])
        if int(expert_offsets[0]) != 0 or bool((expert_offsets.diff() < 0).any()):
            raise ValueError(f"expert_offsets must start at 0 and never fall, got {expert_offsets.tolist()}")
        if not last_row == last_slot <= min(token_N.shape[0], row_of_slot_N.shape[0]):
            raise ValueError(
                f"expert_offsets end at {last_row} and token_offsets at {last_slot}: they must agree and not exceed the {token_N.shape[0]} rows "
                f"and {row_of_slot_N.shape[0]} slots"
            )
