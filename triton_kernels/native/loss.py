"""The output head with its cross-entropy in C on a CPU: logits exist for a few hundred tokens at a time.

Legend: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, threads, wide


def mean_head_loss(x_TD: Tensor, head_VD: Tensor, target_T: Tensor, *, ignored: int) -> Tensor:
    """Mean over all T tokens of the cross-entropy of x W^T in nats, all fp32; a token whose target is `ignored` counts
    as 0.

    Raises:
        ValueError: for another target outside the vocabulary.
    """
    loss = _HeadLoss.apply(x_TD, head_VD, target_T, ignored)
    assert isinstance(loss, Tensor)
    return loss


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients together with the loss, while the logits are there, and keeps them for backward."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, head_VD: Tensor, target_T: Tensor, ignored: int) -> Tensor:
        x_TD, head_VD, loss_T = wide(x_TD), wide(head_VD), torch.empty(len(x_TD))
        gradients = (None, None)
        if any(ctx.needs_input_grad):
            gradients = torch.empty_like(x_TD), torch.empty_like(head_VD)
        sizes = (*x_TD.shape, len(head_VD))
        call(
            "head_loss",
            *(x_TD, head_VD, target_T.contiguous(), loss_T, *gradients),
            *(sizes[0], sizes[2], sizes[1], ignored, threads()),
        )
        ctx.save_for_backward(*gradients)
        return loss_T.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx_TD, d_head_VD = ctx.saved_tensors
        # Training's own case is 1, and then there is nothing to multiply.
        if d_loss != 1:
            dx_TD, d_head_VD = dx_TD * d_loss, d_head_VD * d_loss
        return dx_TD, d_head_VD, None, None
