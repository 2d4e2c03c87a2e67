"""grouped_mlp on its Triton kernels: three launches forward, five backward, see `grouped_mlp_kernels.py`.

Nothing here waits for the device: the grids need nothing but N, a bound on the number of rows that the shapes give.

Legend: T tokens, N assigned rows, D model width, E experts, F expert width.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
import torch
from torch import Tensor

from triton_kernels.common.launch_tables import Tables
from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv, power_of_two
from triton_kernels.experts.grouped_mlp_kernels import (
    ActivationForm,
    ActivationTensors,
    GateUpForm,
    GateUpTensors,
    RowForm,
    RowTensors,
    WeightForm,
    WeightTensors,
    activation_gradient_kernel,
    combine_kernel,
    gate_up_kernel,
    row_product_kernel,
    weight_gradient_kernel,
)
from triton_kernels.experts.launch_tables import (
    ACTIVATION_GRADIENT,
    GATE_UP,
    ROW_PRODUCT,
    SUM_ROWS,
    SUM_WIDTH,
    WEIGHT_GRADIENT,
)


@kernel_op("grouped_mlp", strided="w_gate_up w_down")
def forward_op(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot: Tensor,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], h [N, 2F], or [0, 2F] if it need not be kept)."""
    N, (E, F, D) = token.shape[0], w_down.shape
    y, h = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(N if keep_h else 0, 2 * F)
    if has_work(y):
        a = x.new_empty(N, F)
        grid, options = _row_tiles(GATE_UP, a, n_experts=E, depth=D, columns=F)
        gate_up_kernel[grid](
            tensors=GateUpTensors(
                x=x,
                # Weights are cast anew in each pass, because a cast copy saved for backward would outweigh all else
                # that is.
                w=w_gate_up.to(x.dtype).contiguous(),
                token=token,
                expert_offsets=expert_offsets,
                h=h,
                a=a,
            ),
            E=E,
            FORM=GateUpForm(D=D, F=F, KEEP_H=keep_h, BLOCK_E=power_of_two(E)),
            **options,
        )
        out = _row_product(a, w_down, expert_offsets, D, transposed=False)
        _combine(out, weight, token_offsets=token_offsets, row_of_slot=row_of_slot, y=y)
    return y, h


@kernel_op("grouped_mlp_backward", strided="w_gate_up w_down")
def backward_op(
    dy: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot: Tensor,
    h: Tensor,
    experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, the rows' weight gradient, and if `experts` the gradients of both weights, in the dtype of each; zero for an
    expert without rows)."""
    N, (E, F, D) = token.shape[0], w_down.shape
    dx, dh, aw = torch.empty_like(dy), torch.empty_like(h), h.new_empty(N, F)
    grid, options = _row_tiles(ACTIVATION_GRADIENT, h, n_experts=E, depth=D, columns=F)
    # Rows of padding belong to no program, and their weights' gradient is zero.
    partial = dy.new_zeros(cdiv(F, options["BLOCK_N"]), N, dtype=torch.float32)
    if has_work(dx):
        activation_gradient_kernel[grid](
            tensors=ActivationTensors(
                dy=dy,
                w=w_down.to(dy.dtype).contiguous(),
                h=h,
                token=token,
                weight=weight,
                expert_offsets=expert_offsets,
                dh=dh,
                aw=aw,
                partial=partial,
            ),
            n_all_rows=N,
            E=E,
            FORM=ActivationForm(D=D, F=F, BLOCK_E=power_of_two(E)),
            **options,
        )
        dout = _row_product(dh, w_gate_up, expert_offsets, D, transposed=True)
        _combine(dout, None, token_offsets=token_offsets, row_of_slot=row_of_slot, y=dx)
    d_gate_up, d_down = (w.new_empty(w.shape if experts else 0) for w in (w_gate_up, w_down))
    options = _options(WEIGHT_GRADIENT, x.dtype, D)
    for left, right, dw, gather_left in ((x, dh, d_gate_up, True), (aw, dy, d_down, False)):
        if has_work(dw):
            _, height, width = dw.shape
            grid = (E * cdiv(height, options["BLOCK_M"]) * cdiv(width, options["BLOCK_N"]),)
            weight_gradient_kernel[grid](
                tensors=WeightTensors(left=left, right=right, token=token, expert_offsets=expert_offsets, dw=dw),
                FORM=WeightForm(HEIGHT=height, WIDTH=width, GATHER_LEFT=gather_left),
                **options,
            )
    return dx, partial.sum(0).to(weight.dtype), d_gate_up, d_down


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor, _: None):
    # Experts that are frozen are half of the backward's work less.
    experts = any(ctx.needs_input_grad[1:3])
    dx, dweight, *dw = backward_op(dy, *ctx.saved_tensors, experts)
    return dx, *(dw if experts else (None, None)), None, dweight, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


def _options(tables: Tables, dtype: torch.dtype, width: int) -> dict[str, int]:
    return tables[dtype == torch.float32].options(width)[0].keywords


def _row_tiles(
    tables: Tables, rows: Tensor, *, n_experts: int, depth: int, columns: int
) -> tuple[tuple[int], dict[str, int]]:
    """(grid, launch options) of a kernel with tiles of `rows` and of so many columns; see `expert_tile` for the number
    of row tiles."""
    options = _options(tables, rows.dtype, depth)
    return ((rows.shape[0] // options["BLOCK_M"] + n_experts) * cdiv(columns, options["BLOCK_N"]),), options


def _row_product(rows: Tensor, w: Tensor, expert_offsets: Tensor, D: int, *, transposed: bool) -> Tensor:
    """rows @ w[expert] [N, D], or by the transpose."""
    (N, depth), E = rows.shape, w.shape[0]
    grid, options = _row_tiles(ROW_PRODUCT, rows, n_experts=E, depth=D, columns=D)
    out, w = rows.new_empty(N, D), w.to(rows.dtype).contiguous()
    row_product_kernel[grid](
        tensors=RowTensors(rows=rows, w=w, expert_offsets=expert_offsets, out=out),
        E=E,
        FORM=RowForm(DEPTH=depth, WIDTH=D, TRANSPOSED=transposed, BLOCK_E=power_of_two(E)),
        **options,
    )
    return out


def _combine(rows: Tensor, weight: Tensor | None, *, token_offsets: Tensor, row_of_slot: Tensor, y: Tensor) -> None:
    """y: the sum of each token's rows, times their weights where there are any."""
    T, D = y.shape
    block_d = min(power_of_two(D), SUM_WIDTH)
    combine_kernel[T, cdiv(D, block_d)](
        rows_ptr=rows,
        weight_ptr=weight,
        token_offsets_ptr=token_offsets,
        row_of_slot_ptr=row_of_slot,
        y_ptr=y,
        D=D,
        BLOCK_S=SUM_ROWS,
        BLOCK_D=block_d,
        num_warps=4,
    )
