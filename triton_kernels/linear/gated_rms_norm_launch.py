"""gated_rms_norm on its Triton kernel: one launch forward; backward one launch, and one sum of the weight's partial
gradients.

Legend: N rows (all dimensions but the last), D width of the norm, P programs.
"""

# The launches' constexpr parameters are plain values to the caller, which a type checker cannot know.
# pyright: reportArgumentType=false
import torch
from torch import Tensor

from triton_kernels.common.registration import has_work, kernel_op
from triton_kernels.common.sizes import cdiv
from triton_kernels.linear.gated_rms_norm_kernels import Gradients, Inputs, norm_kernel

MAX_WIDTH = 16384
# Elements of a step of one program, and the programs that share the rows of a backward: their partial sums cost P x D.
STEP_ELEMENTS = 2048
BACKWARD_PROGRAMS = 264


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
        norm_kernel[(steps,)](
            inputs=Inputs(x=x, gate=gate, weight=weight),
            y=y,
            gradients=Gradients(dy=None, dx=None, dgate=None, partial=None),
            N=N,
            D=x.shape[-1],
            eps=eps,
            steps=1,
            SILU=silu,
            **blocks,
        )
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
    steps_each = cdiv(steps, BACKWARD_PROGRAMS)
    partial_PD = x.new_empty(cdiv(steps, steps_each), x.shape[-1], dtype=torch.float32)
    norm_kernel[(len(partial_PD),)](
        inputs=Inputs(x=x, gate=gate, weight=weight),
        y=None,
        gradients=Gradients(dy=dy, dx=dx, dgate=dgate, partial=partial_PD),
        N=N,
        D=x.shape[-1],
        eps=eps,
        steps=steps_each,
        SILU=silu,
        **blocks,
    )
    return dx, dgate, partial_PD.sum(0).to(weight.dtype)


def save(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, dy: Tensor):
    return *backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None


forward_op.register_autograd(backward, setup_context=save)
