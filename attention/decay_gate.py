"""The gate that decides how fast a delta-rule layer forgets: g = -exp(A_log) softplus(a + dt_bias), a log-decay (arXiv
2405.21060, 2412.06464).

Legend: B batch, T tokens, H heads, K gate channels per head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from triton_kernels.linear.linear_decode import decay_gate

# Where decays start: exp(A_log) is uniform in the first range and softplus(dt_bias) log-uniform in the second, as in
# Mamba-2 (arXiv 2405.21060).
DECAY_RATE = (1.0, 16.0)
TIME_STEP = (1e-3, 1e-1)


class DecayGate(nn.Module):
    """From a [B, T, H * K] to log-decays [B, T, H, K] <= 0 in fp32: one rate per head, one bias per channel.

    Args:
        n_heads: the H above.
        n_channels: the K above: 1 where a head forgets as a whole.
    """

    def __init__(self, n_heads: int, n_channels: int) -> None:
        super().__init__()
        self.A_log_H = nn.Parameter(torch.zeros(n_heads))
        self.dt_bias = nn.Parameter(torch.zeros(n_heads * n_channels))

    def draw(self, generator: torch.Generator) -> None:
        """Fresh weights from the generator."""
        low, high = DECAY_RATE
        shortest, longest = TIME_STEP
        with torch.no_grad():
            self.A_log_H.copy_(uniform(self.A_log_H.shape, low, high, generator).log())
            time_step = uniform(self.dt_bias.shape, math.log(shortest), math.log(longest), generator).exp()
            # The inverse of softplus.
            self.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))

    def forward(self, a: Tensor) -> Tensor:
        return decay_gate(a, self.A_log_H, self.dt_bias)


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers from [low, high) by the generator, fp32 on its device."""
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)
