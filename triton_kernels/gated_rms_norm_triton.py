"""gated_rms_norm on Triton: one launch forward; backward one launch, and one sum of the weight's partial gradients.

With r = rsqrt(mean(x^2) + eps), n = r x and u = dy * weight * act(gate):  dx = r (u - n mean(u n)),  dgate = dy * n *
weight * act'(gate), dweight = sum over rows of dy * n * act(gate). A program holds whole rows, so x is read once; r is
computed again in the backward, from the x that it reads anyway, rather than saved.

Legend: N rows (all dimensions but the last), D width of the norm, M rows of a step, P programs.
"""

# Constants given as Python values are beyond a type checker.
# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.registration import has_work, kernel_op

MAX_WIDTH = 16384
# Elements of a step of one program, and the programs that share the rows of a backward: their partial sums cost P x D.
STEP_ELEMENTS = 2048
BACKWARD_PROGRAMS = 264


@triton.jit
def norm_kernel(
    x,
    gate,
    weight,
    y,
    dy,
    dx,
    dgate,
    partial,
    N,
    D,
    eps,
    steps,
    SILU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y of this program's rows or, where there is a dy, their dx and dgate and its share of dweight, partial [P, D] in
    fp32."""
    d_D = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    dweight_D = tl.zeros([BLOCK_D], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for step in range(0, steps):
        row_M = (program * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        offset_MD = row_M[:, None] * D + d_D[None, :]
        mask_MD = (row_M < N)[:, None] & (d_D < D)[None, :]
        x_MD = tl.load(x + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
        gate_MD = tl.load(gate + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
        r_M1 = (1 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / D + eps))[:, None]
        n_MD = x_MD * r_M1
        sigmoid_MD = tl.sigmoid(gate_MD)
        act_MD = gate_MD * sigmoid_MD if SILU else sigmoid_MD
        if dy is None:
            tl.store(y + offset_MD, (n_MD * weight_D[None, :] * act_MD).to(y.dtype.element_ty), mask=mask_MD)
        else:
            slope_MD = sigmoid_MD * (1 + gate_MD * (1 - sigmoid_MD)) if SILU else sigmoid_MD * (1 - sigmoid_MD)
            dy_MD = tl.load(dy + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
            u_MD = dy_MD * weight_D[None, :] * act_MD
            dx_MD = r_M1 * (u_MD - n_MD * (tl.sum(u_MD * n_MD, 1) / D)[:, None])
            tl.store(dx + offset_MD, dx_MD.to(dx.dtype.element_ty), mask=mask_MD)
            tl.store(
                dgate + offset_MD,
                (dy_MD * n_MD * weight_D[None, :] * slope_MD).to(dgate.dtype.element_ty),
                mask=mask_MD,
            )
            dweight_D += tl.sum(dy_MD * n_MD * act_MD, 0)
    if dy is not None:
        tl.store(partial + program * D + d_D, dweight_D, mask=d_D < D)


def step_sizes(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """(N, steps over the N rows, their block sizes and warps): a step is about STEP_ELEMENTS, and a row never leaves
    its program."""
    D = x.shape[-1]
    N, block_d = x.numel() // D, max(16, 1 << (D - 1).bit_length())
    block_m = max(1, STEP_ELEMENTS // block_d)
    return N, -(-N // block_m), {"BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": min(16, max(4, block_d // 512))}


@kernel_op("gated_rms_norm")
def forward_op(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """y in the shape and dtype of x; the arguments are those of `gated_rms_norm`, already checked."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if has_work(y):
        N, steps, blocks = step_sizes(x)
        inputs = (t.contiguous() for t in (x, gate, weight))
        norm_kernel[(steps,)](*inputs, y, None, None, None, None, N, x.shape[-1], eps, 1, SILU=silu, **blocks)
    return y


@kernel_op("gated_rms_norm_backward")
def backward_op(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gate and weight."""
    dx, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if not has_work(dx):
        return dx, dgate, torch.zeros_like(weight)
    N, steps, blocks = step_sizes(x)
    steps_each = triton.cdiv(steps, BACKWARD_PROGRAMS)
    partial_PD = x.new_empty(triton.cdiv(steps, steps_each), x.shape[-1], dtype=torch.float32)
    x, gate, weight_D, dy = (t.contiguous() for t in (x, gate, weight, dy))
    norm_kernel[(len(partial_PD),)](
        x, gate, weight_D, None, dy, dx, dgate, partial_PD, N, x.shape[-1], eps, steps_each, SILU=silu, **blocks
    )
    return dx, dgate, partial_PD.sum(0).to(weight.dtype)


def save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, dy: Tensor):
    return *backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None


forward_op.register_autograd(backward, setup_context=save)
