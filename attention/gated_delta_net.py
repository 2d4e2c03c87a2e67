"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state is corrected by the delta rule and forgets by a gate.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    q, k, v = SiLU(conv(x W)), q and k of unit length;  g = -exp(A_log) softplus(x W_a + dt_bias),  beta = sigmoid(x W_b)
    y = W_o(RMSNorm(o) * SiLU(x W_g)), the norm per head

Legend: B batch, T tokens, D model width, H heads, K key width, V value width, X convolution channels, W convolution width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.config import AttentionConfig
from attention.layer import AttentionLayer
from attention.layer_states import KV, RecurrentState
from attention.norm import RMSNorm
from attention.projection import Projection
from triton_kernels.causal_conv1d import causal_conv1d
from triton_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from triton_kernels.gated_rms_norm import gated_rms_norm

# Range of the initial decay rates: exp(A_log) is uniform and the gate's softplus log-uniform within these, as in Mamba-2 (arXiv 2405.21060).
DECAY_RATE = (1.0, 16.0)
TIME_STEP = (1e-3, 1e-1)


class GatedDeltaNet(AttentionLayer):
    """G. Its memory is one K x V matrix per head and the last W - 1 inputs of the convolution."""

    state_type = RecurrentState

    def __init__(self, letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int) -> None:
        super().__init__(letter, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.config = config
        H, _, V = config.linear_shape
        self.to_inner = Projection(d_model, config.conv_channels + H * V + 2 * H)
        self.conv_XW = nn.Parameter(torch.zeros(config.conv_channels, config.conv_width))
        self.A_log_H = nn.Parameter(torch.zeros(H))
        self.dt_bias_H = nn.Parameter(torch.zeros(H))
        self.norm = RMSNorm(V, eps=config.norm_eps)
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        bound = self.config.conv_width**-0.5
        H = len(self.A_log_H)
        with torch.no_grad():
            self.conv_XW.copy_(_uniform(self.conv_XW.shape, -bound, bound, generator))
            self.A_log_H.copy_(_uniform((H,), *DECAY_RATE, generator).log())
            time_step_H = _uniform((H,), *map(math.log, TIME_STEP), generator).exp()
            # The inverse of softplus.
            self.dt_bias_H.copy_(time_step_H + torch.log(-torch.expm1(-time_step_H)))

    def forward(self, x_BTD: Tensor, *, start: int = 0, state: RecurrentState | None = None, shared: KV | None = None) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        B, T, _ = x_BTD.shape
        H, K, V = self.config.linear_shape
        qkv_BTX, gate, a_BTH, b_BTH = self.to_inner(x_BTD).split([self.config.conv_channels, H * V, H, H], dim=-1)
        tail = None if state is None else state.tail_BXW
        qkv_BTX, tail = causal_conv1d(qkv_BTX, self.conv_XW.to(x_BTD.dtype), activation="silu", initial_tail=tail)
        q, k, v = qkv_BTX.split([H * K, H * K, H * V], dim=-1)
        q_BTHK, k_BTHK, v_BTHV = q.view(B, T, H, K), k.view(B, T, H, K), v.view(B, T, H, V)
        log_decay_BTH = -self.A_log_H.exp() * functional.softplus(a_BTH + self.dt_bias_H)
        beta_BTH = b_BTH.to(log_decay_BTH.dtype).sigmoid()
        if state is not None and T == 1:
            q_BHK, k_BHK, v_BHV = q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0]
            o_BHV, last_BHKV = gated_delta_rule_step(q_BHK, k_BHK, v_BHV, log_decay_BTH[:, 0], beta_BTH[:, 0], state.state_BHKV, normalize_qk=True)
            o_BTHV = o_BHV[:, None]
        else:
            o_BTHV, last_BHKV = gated_delta_rule(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                log_decay_BTH,
                beta_BTH,
                normalize_qk=True,
                initial_state_BHKV=None if state is None else state.state_BHKV,
                chunk_size=self.config.chunk_size,
            )
        if state is not None:
            state.update(T, last_BHKV, tail)
        o_BTHV = gated_rms_norm(o_BTHV, gate.view(B, T, H, V), self.norm.weight, eps=self.norm.eps, activation="silu")
        return self.to_out(o_BTHV.flatten(2)), None


def _uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator)
