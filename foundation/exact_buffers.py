"""Modules whose buffers hold numbers that no dtype of weights is wide enough for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ExactBuffers(nn.Module):
    """A module that keeps its buffers, and those of all modules in it, when its weights are rounded.

    `model.bfloat16()`, `.half()` and `.to(dtype)` round buffers along with the weights. Counts stop at 256 then, biases
    no longer move by their steps, and thresholds and decays are off in the third digit, all without a word. Other
    devices and wider dtypes reach buffers as ever.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = [
            (module, name, buffer)
            for module in (self.modules() if recurse else (self,))
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            moved = module._buffers[name]
            if moved is not None and moved.dtype.itemsize < buffer.dtype.itemsize:
                module._buffers[name] = buffer.to(moved.device)
        return self
