"""The one kernel of gated_rms_norm, forward and backward.

With r = rsqrt(mean(x^2) + eps), n = r x and u = dy * weight * act(gate):  dx = r (u - n mean(u n)),  dgate = dy * n *
weight * act'(gate), dweight = sum over rows of dy * n * act(gate). A program holds whole rows, so x is read once; r is
computed again in the backward, from the x that it reads anyway, rather than saved.

Legend: N rows (all dimensions but the last), D width of the norm, M rows of a step, P programs.
"""

from collections import namedtuple

import triton
import triton.language as tl

Inputs = namedtuple("Inputs", "x gate weight")
# All None forward.
Gradients = namedtuple("Gradients", "dy dx dgate partial")


@triton.jit
def norm_kernel(
    inputs,
    y,
    gradients,
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
    x, gate, weight = inputs
    dy, dx, dgate, partial = gradients
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
