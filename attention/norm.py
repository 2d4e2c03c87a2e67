"""RMSNorm (arXiv 1910.07467) with statistics in fp32.

Legend: D normalised width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from triton_kernels.native.decode_step import NotInOneCall, Watch
from triton_kernels.native.library import is_native, rms_norm, takes_many_rows
from triton_kernels.native.norm import rms_norm_with_gradients


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in fp32 (fp64 for fp64 inputs), returned in
    the dtype of x.

    Args:
        width: the D above.
        eps: added to the mean square.
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Other widths are torch's to refuse: the native forms would read beyond the weights.
        if x.shape[-1:] == self.weight.shape:
            if is_native(x, x.numel() // x.shape[-1], self.weight):
                return rms_norm(x, self.weight, self.eps)
            if takes_many_rows(x, self.weight):
                return rms_norm_with_gradients(x, self.weight, self.eps)
        # The mean of squares of 16-bit numbers loses what the norm is there to keep.
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def describe_norm(norm: nn.Module, watch: Watch, *, width: int, eps: float) -> int | None:
    """Where the weights of an RMSNorm lie for a step in one call; None where there is no norm."""
    watch.module(norm)
    if type(norm) is nn.Identity:
        return None
    if type(norm) is not RMSNorm or norm.eps != eps:
        raise NotInOneCall(f"a norm that is no RMSNorm of eps {eps}")
    watch.same(norm, "eps")
    return watch.parameter(norm, "weight", width)
