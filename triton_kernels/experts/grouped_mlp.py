"""Grouped gated MLP: every expert's SwiGLU network on the rows assigned to it, weighted and added up per token.

Legend: T tokens, D model width, E experts, F expert width, F2 = 2F, N assigned rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.common import checks
from triton_kernels.common.checks import (
    check_backend,
    check_offsets,
    check_placed,
    check_range,
    check_shape,
    check_tensors,
)
from triton_kernels.experts.native import grouped_mlp_native
from triton_kernels.native.library import is_native, products_here, takes_many_rows

OP = "grouped_mlp"


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
    """y_t = sum over the rows n of token t of weight_n * W_down^T (SiLU(W_gate^T x_t) * (W_up^T x_t)), with the weights
    of expert_n.

    Args:
        x_TD: floating point; products run in its dtype, sums over a token's rows in fp32 or better.
        w_gate_up_EDF2: the gate's columns first; another dtype than x's is cast on the way in.
        w_down_EFD: as above.
        token_N: int64, each row's token.
        weight_N: floating point, each row's weight.
        expert_offsets, token_offsets, row_of_slot_N: [E + 1], [T + 1] and [N], the fields of
            `routing.assignments.Assignments`: rows sorted by expert, padding behind expert_offsets[E] ignored.
        backend: "torch", a loop over experts, "native", in C on a CPU, "triton", or "auto": Triton on CUDA tensors, C
            where it takes them. `moe.backends` knows more ways.

    Returns:
        y_TD in x's dtype, differentiable in x, both weights and weight_N.

    Raises:
        ValueError: for what does not fit together, or not into the kernels (`why_not_triton`).
    """
    many = takes_many_rows(x_TD, w_gate_up_EDF2, w_down_EFD, dtypes=products_here())
    native = is_native(x_TD, len(x_TD)) or many
    backend = check_backend(backend, x_TD, native=native)
    tensors = (x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, expert_offsets, token_offsets, row_of_slot_N)
    check_grouped_mlp(*tensors)
    if backend == "native":
        return grouped_mlp_native(*tensors)
    if backend == "torch":
        return grouped_mlp_torch(*tensors[:6])
    if (obstacle := why_not_triton(x_TD, w_down_EFD)) is not None:
        raise ValueError(f"{OP}: {obstacle}")
    # Imported here because machines without Triton (macOS) still have the torch backend.
    from triton_kernels.experts.grouped_mlp_launch import forward_op

    keep_h = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, w_gate_up_EDF2, w_down_EFD, weight_N))
    return forward_op(*tensors, keep_h)[0]


def grouped_mlp_torch(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor
) -> Tensor:
    """A loop over experts that says what the operation is, in any floating dtype, fp64 included."""
    bounds = expert_offsets.tolist()
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    # Unbound once: indexing the packed weights in the loop would make each backward step write a full-size gradient.
    for start, stop, w_gate_up_DF2, w_down_FD in zip(bounds, bounds[1:], w_gate_up_EDF2.unbind(), w_down_EFD.unbind()):
        rows = slice(start, stop)
        gate_NF, up_NF = (x_TD.index_select(0, token_N[rows]) @ w_gate_up_DF2.to(x_TD.dtype)).chunk(2, dim=-1)
        out_ND = (F.silu(gate_NF) * up_NF) @ w_down_FD.to(x_TD.dtype)
        y_TD = y_TD.index_add(0, token_N[rows], out_ND * weight_N[rows, None].to(y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def why_not_triton(x_TD: Tensor, w_down_EFD: Tensor) -> str | None:
    """Why the Triton kernels cannot run on these tensors, or None. On the CPU they run in Triton's interpreter only."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels do not take {x_TD.dtype}"
    if any(width % 16 for width in w_down_EFD.shape[1:]):
        return f"the Triton kernels need widths that are multiples of 16, got {tuple(w_down_EFD.shape[1:])}"
    return None


def check_grouped_mlp(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
) -> None:
    """Refuse shapes that do not fit, indices and offsets that would read elsewhere."""
    sizes = check_tensors(OP, x_TD=x_TD, w_down_EFD=w_down_EFD, token_N=token_N, weight_N=weight_N)
    check_tensors(OP, sizes | {"F2": 2 * sizes["F"]}, w_gate_up_EDF2=w_gate_up_EDF2)
    check_shape(OP, "expert_offsets", expert_offsets, {"E+1": sizes["E"] + 1})
    check_shape(OP, "token_offsets", token_offsets, {"T+1": sizes["T"] + 1})
    check_placed(
        OP,
        x_TD=x_TD,
        w_gate_up_EDF2=w_gate_up_EDF2,
        w_down_EFD=w_down_EFD,
        weight_N=weight_N,
        token_N=token_N,
        expert_offsets=expert_offsets,
        token_offsets=token_offsets,
        row_of_slot_N=row_of_slot_N,
    )
    n_slots = row_of_slot_N.shape[0]
    check_offsets(OP, "expert_offsets", expert_offsets, sizes["N"])
    check_offsets(OP, "token_offsets", token_offsets, n_slots)
    if not checks.values_are_checked(x_TD):
        return
    last_row, last_slot = expert_offsets[-1], token_offsets[-1]
    row_is_used_N = torch.arange(sizes["N"], device=x_TD.device) < last_row
    slot_is_used_N = torch.arange(n_slots, device=x_TD.device) < last_slot
    check_range(OP, "token_N", token_N, 0, sizes["T"] - 1, row_is_used_N)
    check_range(OP, "row_of_slot_N", row_of_slot_N, 0, last_row - 1, slot_is_used_N)
    if not checks.values_are_free(x_TD):
        checks.refuse_on_device(OP, "expert_offsets and token_offsets must end alike", last_row == last_slot)
    elif last_row != last_slot:
        ends = f"expert_offsets end at {last_row.item()} and token_offsets at {last_slot.item()}"
        raise ValueError(f"{OP}: {ends}; they must agree")
