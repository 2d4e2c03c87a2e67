"""gated_rms_norm on Triton: one launch forward; backward one launch, and one sum of the weight's partial gradients.

With r = rsqrt(mean(x^2) + eps), n = r x and u = dy * weight * act(gate):  dx = r (u - n mean(u n)),  dgate = dy * n * weight * act'(gate),
dweight = sum over rows of dy * n * act(gate). A program holds whole rows, so x is read once; r is computed again in the backward, from the x that it
reads anyway, rather than saved.

Legend: N rows, D width of the norm, M rows of a step, P programs.
"""

# Jitted helpers that return tuples, and constants given as Python values, are beyond a type checker.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384
# Elements of a step of one program, and the programs that share the rows of a backward: their partial sums cost P x D.
STEP_ELEMENTS = 2048
BACKWARD_PROGRAMS = 264


@triton.jit
def activated(gate, SILU: tl.constexpr):
    """(act(gate), act'(gate))."""
    sigmoid = tl.sigmoid(gate)
    if SILU:
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    else:
        return sigmoid, sigmoid * (1 - sigmoid)


@triton.jit
def norm_forward_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, N, D, eps, SILU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    row_M = tl.full([BLOCK_M], 0, tl.int64) + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    mask_MD = (row_M < N)[:, None] & (d_D < D)[None, :]
    offset_MD = row_M[:, None] * D + d_D[None, :]
    x_MD = tl.load(x_ptr + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
    gate_MD = tl.load(gate_ptr + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    r_M = 1 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / D + eps)
    act_MD, _ = activated(gate_MD, SILU)
    y_MD = x_MD * r_M[:, None] * weight_D[None, :] * act_MD
    tl.store(y_ptr + offset_MD, y_MD.to(y_ptr.dtype.element_ty), mask=mask_MD)


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, gate_ptr, weight_ptr, dx_ptr, dgate_ptr, partial_ptr, N, D, eps, steps,
    SILU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx and dgate of this program's rows, and its share of dweight, partial [P, D] in fp32."""
    d_D = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    dweight_D = tl.zeros([BLOCK_D], tl.float32)
    program = tl.full((), 0, tl.int64) + tl.program_id(0)
    for step in range(0, steps):
        row_M = (program * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_MD = (row_M < N)[:, None] & (d_D < D)[None, :]
        offset_MD = row_M[:, None] * D + d_D[None, :]
        x_MD = tl.load(x_ptr + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
        gate_MD = tl.load(gate_ptr + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
        dy_MD = tl.load(dy_ptr + offset_MD, mask=mask_MD, other=0.0).to(tl.float32)
        r_M = 1 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / D + eps)
        n_MD = x_MD * r_M[:, None]
        act_MD, slope_MD = activated(gate_MD, SILU)
        u_MD = dy_MD * weight_D[None, :] * act_MD
        dx_MD = r_M[:, None] * (u_MD - n_MD * (tl.sum(u_MD * n_MD, 1) / D)[:, None])
        tl.store(dx_ptr + offset_MD, dx_MD.to(dx_ptr.dtype.element_ty), mask=mask_MD)
        tl.store(dgate_ptr + offset_MD, (dy_MD * n_MD * weight_D[None, :] * slope_MD).to(dgate_ptr.dtype.element_ty), mask=mask_MD)
        dweight_D += tl.sum(dy_MD * n_MD * act_MD, 0)
    tl.store(partial_ptr + program * D + d_D, dweight_D, mask=d_D < D)


def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """y in the shape and dtype of x; the arguments are those of `gated_rms_norm`, already checked."""
    return torch.ops.hybrid_attention.gated_rms_norm(x, gate, weight, eps, silu)


def _blocks(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """(N, D, block sizes and warps): a program's step is about STEP_ELEMENTS, and a row never leaves its program."""
    D = x.shape[-1]
    block_d = max(16, 1 << (D - 1).bit_length())
    return x.numel() // D, D, {"BLOCK_M": max(1, STEP_ELEMENTS // block_d), "BLOCK_D": block_d, "num_warps": min(16, max(4, block_d // 512))}


@torch.library.custom_op("hybrid_attention::gated_rms_norm", mutates_args=())
def forward_op(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() > 0:
        N, D, blocks = _blocks(x)
        norm_forward_kernel[(-(-N // blocks["BLOCK_M"]),)](x.contiguous(), gate.contiguous(), weight.contiguous(), y, N, D, eps, SILU=silu, **blocks)
    return y


@forward_op.register_fake
def _(x, gate, weight, eps, silu):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("hybrid_attention::gated_rms_norm_backward", mutates_args=())
def backward_op(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if x.numel() == 0:
        return dx, dgate, torch.zeros_like(weight)
    N, D, blocks = _blocks(x)
    all_steps = -(-N // blocks["BLOCK_M"])
    steps = -(-all_steps // BACKWARD_PROGRAMS)
    n_programs = -(-all_steps // steps)
    partial_PD = x.new_empty(n_programs, D, dtype=torch.float32)
    inputs = [t.contiguous() for t in (dy, x, gate, weight)]
    norm_backward_kernel[(n_programs,)](*inputs, dx, dgate, partial_PD, N, D, eps, steps, SILU=silu, **blocks)
    return dx, dgate, partial_PD.sum(0).to(weight.dtype)


@backward_op.register_fake
def _(dy, x, gate, weight, eps, silu):
    dx, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return dx, dgate, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    gradients = torch.ops.hybrid_attention.gated_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.silu)
    return (*gradients, None, None)


forward_op.register_autograd(_backward, setup_context=_save)
