"""The output head with its cross-entropy in C on a CPU: logits exist for a few hundred tokens at a time.

Legend: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triton_kernels.native.library import call, threads, wide


def head_losses(
    x_TD: Tensor, head_VD: Tensor, target_T: Tensor, *, ignored: int, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of x W^T in nats, all fp32: its mean over all T tokens, and that of each token, which has no
    gradient. A token whose target is `ignored` counts as 0.

    Args:
        bf16: products round what they read to it.

    Raises:
        ValueError: for another target outside the vocabulary.
    """
    if torch.is_grad_enabled() and (x_TD.requires_grad or head_VD.requires_grad):
        return _HeadLoss.apply(x_TD, head_VD, target_T, ignored, bf16)  # pyright: ignore[reportReturnType]
    loss_T = _losses(wide(x_TD), wide(head_VD), target_T, ignored, (None, None), bf16)
    return loss_T.mean(), loss_T


def _losses(
    x_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    ignored: int,
    gradients: tuple[Tensor | None, Tensor | None],
    bf16: bool,
) -> Tensor:
    """Fills in the gradients of the mean."""
    (T, D), V, loss_T = x_TD.shape, len(head_VD), torch.empty(len(x_TD))
    call("head_loss", x_TD, head_VD, target_T.contiguous(), loss_T, *gradients, T, V, D, ignored, bf16, threads())
    return loss_T


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients together with the loss, while the logits are there, and keeps them for backward."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_VD: Tensor, target_T: Tensor, ignored: int, bf16: bool
    ) -> tuple[Tensor, Tensor]:
        x_TD, head_VD = wide(x_TD), wide(head_VD)
        gradients = torch.empty_like(x_TD), torch.empty_like(head_VD)
        loss_T = _losses(x_TD, head_VD, target_T, ignored, gradients, bf16)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(loss_T)
        return loss_T.mean(), loss_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx_TD, d_head_VD = ctx.saved_tensors
        # Training's own case is 1, and then there is nothing to multiply.
        if d_loss != 1:
            dx_TD, d_head_VD = dx_TD * d_loss, d_head_VD * d_loss
        return dx_TD, d_head_VD, None, None, None
