"""The gate that decides how fast a delta-rule layer forgets: g = -exp(A_log) softplus(a + dt_bias), a log-decay (arXiv
2405.21060, 2412.06464), or a bounded one, g = -bound sigmoid(exp(A_log) (a + dt_bias)), as in Ling 3.0 and GLM-5.3,
whose KDA layers never forget more than e^-5 of a channel at once.

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
        bound: log-decays stay above minus this; None for no bound.
    """

    def __init__(self, n_heads: int, n_channels: int, bound: float | None = None) -> None:
        super().__init__()
        self.bound = bound
        self.A_log_H = nn.Parameter(torch.zeros(n_heads))
        self.dt_bias = nn.Parameter(torch.zeros(n_heads * n_channels))

    def draw(self, generator: torch.Generator) -> None:
        """Fresh weights from the generator."""
        low, high = DECAY_RATE
        shortest, longest = TIME_STEP
        with torch.no_grad():
            self.A_log_H.copy_(uniform(self.A_log_H.shape, low, high, generator).log())
            time_step = uniform(self.dt_bias.shape, math.log(shortest), math.log(longest), generator).exp()
            if self.bound is None:
                # The inverse of softplus.
                self.dt_bias.copy_(time_step + torch.log(-torch.expm1(-time_step)))
                return
            # The inverse of the bounded gate, so that layers of either begin at the same decays.
            decay_HK = self.A_log_H.exp()[:, None] * time_step.view(len(self.A_log_H), -1)
            logit_HK = (decay_HK / self.bound).clamp(max=0.99).logit()
            self.dt_bias.copy_((logit_HK / self.A_log_H.exp()[:, None]).flatten())

    def forward(self, a: Tensor) -> Tensor:
        if self.bound is None:
            return decay_gate(a, self.A_log_H, self.dt_bias)
        # In at least fp32, as the parameters are.
        inner_HK = (a + self.dt_bias).unflatten(-1, (len(self.A_log_H), -1))
        return -self.bound * (self.A_log_H.exp()[:, None] * inner_HK).sigmoid()


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers from [low, high) by the generator, fp32 on its device."""
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)
