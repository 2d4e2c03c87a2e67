"""grouped_mlp on its Triton kernels, as operators that torch.compile and CUDA graphs see as one node each.

Nothing here waits for the device: grids follow from N, the bound on the number of rows that the shapes give. Saved for backward are x, the
pre-activations h, and what the router made.

Legend: T tokens, D model width, E experts, F expert width, N assigned rows.
"""

# Constants given as Python values are beyond a type checker.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false
import torch
import triton
from torch import Tensor

from triton_kernels.grouped_mlp_backward import activation_gradient_kernel, weight_gradient_kernel
from triton_kernels.grouped_mlp_configurations import ACTIVATION_GRADIENT, GATE_UP, ROW_PRODUCT, SUM_ROWS, SUM_WIDTH, WEIGHT_GRADIENT, Tables
from triton_kernels.grouped_mlp_forward import combine_kernel, gate_up_kernel, row_product_kernel


def grouped_mlp_triton(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot_N: Tensor,
) -> Tensor:
    """y_TD; the arguments are those of `grouped_mlp`, already checked."""
    keep_h = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, w_gate_up_EDF2, w_down_EFD, weight_N))
    tensors = (x_TD, w_gate_up_EDF2, w_down_EFD, token_N, weight_N, expert_offsets, token_offsets, row_of_slot_N)
    return torch.ops.hybrid_attention.grouped_mlp(*tensors, keep_h)[0]


@torch.library.custom_op("hybrid_attention::grouped_mlp", mutates_args=())
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
    h = x.new_empty(N if keep_h else 0, 2 * F)
    if N == 0 or x.shape[0] == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h
    w_gate_up, w_down = _as_rows(w_gate_up, x.dtype), _as_rows(w_down, x.dtype)
    a, out = x.new_empty(N, F), x.new_empty(N, D)
    grid, options = _row_tiles(GATE_UP, a, w_down, F)
    gate_up_kernel[grid](x.contiguous(), w_gate_up, token, expert_offsets, h, a, E, D=D, F=F, KEEP_H=keep_h, **options)
    grid, options = _row_tiles(ROW_PRODUCT, a, w_down, D)
    row_product_kernel[grid](a, w_down, expert_offsets, out, E, DEPTH=F, WIDTH=D, TRANSPOSED=False, **options)
    return _combine(out, weight, token_offsets, row_of_slot), h


@forward_op.register_fake
def _(x, w_gate_up, w_down, token, weight, expert_offsets, token_offsets, row_of_slot, keep_h):
    h = x.new_empty(token.shape[0] if keep_h else 0, w_gate_up.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), h


@torch.library.custom_op("hybrid_attention::grouped_mlp_row_gradients", mutates_args=())
def row_gradients_op(
    dy: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    token: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    token_offsets: Tensor,
    row_of_slot: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, the rows' weight gradient, dh [N, 2F], activations times weight [N, F]); the last two are what the experts' gradients need."""
    N, (E, F, D) = token.shape[0], w_down.shape
    dh, aw = torch.empty_like(h), h.new_empty(N, F)
    if N == 0:
        return torch.zeros_like(dy, memory_format=torch.contiguous_format), torch.zeros_like(weight), dh, aw
    w_gate_up, w_down = _as_rows(w_gate_up, dy.dtype), _as_rows(w_down, dy.dtype)
    grid, options = _row_tiles(ACTIVATION_GRADIENT, h, w_down, F)
    # Rows of padding belong to no program, and their weights' gradient is zero.
    partial = dy.new_zeros(triton.cdiv(F, options["BLOCK_N"]), N, dtype=torch.float32)
    inputs = (dy, w_down, h, token, weight.contiguous(), expert_offsets)
    activation_gradient_kernel[grid](*inputs, dh, aw, partial, N, E, D=D, F=F, **options)
    dx_rows = dy.new_empty(N, D)
    grid, options = _row_tiles(ROW_PRODUCT, dh, w_down, D)
    row_product_kernel[grid](dh, w_gate_up, expert_offsets, dx_rows, E, DEPTH=2 * F, WIDTH=D, TRANSPOSED=True, **options)
    return _combine(dx_rows, None, token_offsets, row_of_slot), partial.sum(0).to(weight.dtype), dh, aw


@row_gradients_op.register_fake
def _(dy, w_gate_up, w_down, token, weight, expert_offsets, token_offsets, row_of_slot, h):
    return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(h), h.new_empty(h.shape[0], h.shape[1] // 2)


@torch.library.custom_op("hybrid_attention::grouped_mlp_expert_gradients", mutates_args=())
def expert_gradients_op(
    dy: Tensor, x: Tensor, dh: Tensor, aw: Tensor, token: Tensor, expert_offsets: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of w_gate_up [E, D, 2F] and w_down [E, F, D], in the dtype of each; those of experts without rows are zero."""
    d_gate_up, d_down = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w_gate_up, w_down))
    options = _options(WEIGHT_GRADIENT, x.dtype, x.shape[1])
    for left, right, dw, gather_left in ((x.contiguous(), dh, d_gate_up, True), (aw, dy, d_down, False)):
        E, height, width = dw.shape
        grid = (E * triton.cdiv(height, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
        weight_gradient_kernel[grid](left, right, token, expert_offsets, dw, HEIGHT=height, WIDTH=width, GATHER_LEFT=gather_left, **options)
    return d_gate_up, d_down


@expert_gradients_op.register_fake
def _(dy, x, dh, aw, token, expert_offsets, w_gate_up, w_down):
    d_gate_up, d_down = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w_gate_up, w_down))
    return d_gate_up, d_down


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy: Tensor, _h_gradient: Tensor | None):
    x, w_gate_up, w_down, token, weight, expert_offsets, token_offsets, row_of_slot, h = ctx.saved_tensors
    dy = dy.contiguous()
    indices = (token, weight, expert_offsets, token_offsets, row_of_slot)
    dx, dweight, dh, aw = torch.ops.hybrid_attention.grouped_mlp_row_gradients(dy, w_gate_up, w_down, *indices, h)
    d_gate_up = d_down = None
    # Experts that are frozen are half of the backward's work less.
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_gate_up, d_down = torch.ops.hybrid_attention.grouped_mlp_expert_gradients(dy, x, dh, aw, token, expert_offsets, w_gate_up, w_down)
    return dx, d_gate_up, d_down, None, dweight, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_save)


def _as_rows(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as the kernels read them: cast anew in each pass, because a cast copy saved for backward would outweigh all else that is."""
    return w.to(dtype).contiguous()


def _options(tables: Tables, dtype: torch.dtype, width: int) -> dict[str, int]:
    options = tables[dtype == torch.float32].options(width)[0]
    return {**options.blocks, "num_warps": options.num_warps, "num_stages": options.num_stages}


def _row_tiles(tables: Tables, rows: Tensor, w_down: Tensor, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """(grid, launch options) of a kernel with tiles of `rows` and of so many columns; see `expert_tile` for the number of row tiles."""
    E, _, D = w_down.shape
    options = _options(tables, rows.dtype, D) | {"BLOCK_E": triton.next_power_of_2(E)}
    return ((rows.shape[0] // options["BLOCK_M"] + E) * triton.cdiv(columns, options["BLOCK_N"]),), options


def _combine(rows: Tensor, weight: Tensor | None, token_offsets: Tensor, row_of_slot: Tensor) -> Tensor:
    T, D = token_offsets.shape[0] - 1, rows.shape[1]
    y = rows.new_empty(T, D)
    block_d = min(triton.next_power_of_2(D), SUM_WIDTH)
    sizes = {"D": D, "WEIGHTED": weight is not None, "BLOCK_S": SUM_ROWS, "BLOCK_D": block_d}
    weight = weight if weight is None else weight.contiguous()
    combine_kernel[(T, triton.cdiv(D, block_d))](rows, weight, token_offsets, row_of_slot, y, **sizes, num_warps=4)
    return y
