"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state is corrected by the delta rule and forgets by a gate
per head.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    q, k, v = SiLU(conv(x W)), q and k of unit length;  g = -exp(A_log) softplus(x W_a + dt_bias),  beta = sigmoid(x
    W_b) y = W_o(RMSNorm(o) * SiLU(x W_g)), the norm per head

Legend: B batch, T tokens, D model width, H heads, K key width, V value width, X convolution channels.
"""

from typing import Any

from torch import Tensor

from attention.config import AttentionConfig
from attention.delta_layer import DeltaLayer
from attention.layer_states import KV, RecurrentState
from attention.projection import Projection
from triton_kernels.linear.gated_delta_rule import gated_delta_rule


class GatedDeltaNet(DeltaLayer):
    """G."""

    def __init__(self, letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int) -> None:
        kind = {"rule": _rule, "decay_channels": 1, "activation": "silu"}
        super().__init__(letter, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers, **kind)
        H, _, V = config.linear_shape
        self.widths = [config.conv_channels, H * V, H, H]
        self.to_inner = Projection(d_model, sum(self.widths))

    def forward(
        self, x_BTD: Tensor, *, start: int = 0, state: RecurrentState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        qkv_BTX, gate_BTX, a_BTH, b_BTH = self.to_inner(x_BTD).split(self.widths, dim=-1)
        return self.to_out(self.mix(qkv_BTX, gate_BTX, a_BTH, b_BTH, state)), None


def _rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay_BTH1: Tensor, beta_BTH: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    return gated_delta_rule(q, k, v, log_decay_BTH1.squeeze(-1), beta_BTH, **options)
