"""A linear map whose fp32 weight is cast to the dtype of its input."""

import torch
from torch import Tensor, nn

from triton_kernels.native.decode_step import NativeWeight, NotInOneCall, Watch
from triton_kernels.native.projection import project


class Projection(nn.Linear):
    """y = x W^T (+ b) in the dtype of x. Construction leaves the weight as memory was; `draw` makes it.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        gain: the weights are normal with standard deviation gain / sqrt(d_in), so that a unit-variance input gives
            variance gain^2.
        bias: whether there is a b, which begins as zero.
    """

    def __init__(self, d_in: int, d_out: int, *, gain: float = 1.0, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.gain = gain

    def reset_parameters(self) -> None:
        """Nothing. nn.Linear's constructor calls this to draw weights from the global generator, which `draw` would
        only overwrite."""

    def draw(self, generator: torch.Generator) -> None:
        """Fresh weights from the generator, drawn on its device: a model on a GPU starts from the same numbers as one
        on the CPU."""
        with torch.no_grad():
            fresh = torch.randn(self.weight.shape, generator=generator, device=generator.device)
            self.weight.copy_(fresh * (self.gain * self.in_features**-0.5))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        y = project(input, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def describe(self, watch: Watch, d_in: int, d_out: int) -> NativeWeight:
        """Where the weight lies for a step in one call, which expects it to have these widths."""
        if type(self) is not Projection or self.bias is not None:
            raise NotInOneCall(f"a projection that is a {type(self).__name__}, or has a bias")
        watch.module(self)
        return watch.weight(self, "weight", d_out, d_in, transposed=True)
