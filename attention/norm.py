"""RMSNorm (arXiv 1910.07467) with statistics in fp32.

Legend: D normalised width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from triton_kernels.native.decode_step import NotInOneCall, Watch
from triton_kernels.native.library import is_native, products_here, rms_norm, takes_many_rows
from triton_kernels.native.norm import rms_norm_with_gradients


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension; computed in fp32 (fp64 for fp64 inputs), returned in
    the dtype of x.

    Args:
        width: the D above.
        eps: added to the mean square.
        unit_offset: the weights are what the scale has beyond one (Gemma, arXiv 2403.08295): weight decay then pulls
            it towards one.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        self.weight = nn.Parameter(torch.empty(width))
        self.reset()

    def reset(self) -> None:
        """Weights that scale by one."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    @property
    def scale(self) -> Tensor:
        """What the normalised input is multiplied by."""
        return 1.0 + self.weight if self.unit_offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale
        # Other widths are torch's to refuse: the native forms would read beyond the weights.
        if x.shape[-1:] == scale.shape:
            if is_native(x, x.numel() // x.shape[-1], scale):
                return rms_norm(x, scale, self.eps)
            if takes_many_rows(x, scale, dtypes=products_here()):
                return rms_norm_with_gradients(x, scale.float(), self.eps)
        # The mean of squares of 16-bit numbers loses what the norm is there to keep.
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.rms_norm(x.to(wide), scale.shape, scale.to(wide), self.eps).to(x.dtype)


def describe_norm(norm: nn.Module, watch: Watch, *, width: int, eps: float) -> int | None:
    """Where the weights of an RMSNorm lie for a step in one call; None where there is no norm."""
    watch.module(norm)
    if type(norm) is nn.Identity:
        return None
    if type(norm) is not RMSNorm or norm.eps != eps or norm.unit_offset:
        raise NotInOneCall(f"a norm that is no RMSNorm of eps {eps} whose weights are its scale")
    watch.same(norm, "eps", "unit_offset")
    return watch.parameter(norm, "weight", width)
