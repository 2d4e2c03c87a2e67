"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state is corrected by the delta rule and forgets by a gate per head.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    q, k, v = SiLU(conv(x W)), q and k of unit length;  g = -exp(A_log) softplus(x W_a + dt_bias),  beta = sigmoid(x W_b)
    y = W_o(RMSNorm(o) * SiLU(x W_g)), the norm per head

Legend: B batch, T tokens, D model width, H heads, K key width, V value width, X convolution channels.
"""

from torch import Tensor

from attention.config import AttentionConfig
from attention.delta_layer import DeltaLayer
from attention.layer_states import KV, RecurrentState
from attention.projection import Projection
from triton_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from triton_kernels.gated_rms_norm import gated_rms_norm


class GatedDeltaNet(DeltaLayer):
    """G."""

    def __init__(self, letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int) -> None:
        rule = {"rule": gated_delta_rule, "rule_step": gated_delta_rule_step, "decay_channels": 1}
        super().__init__(letter, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers, **rule)
        H, _, V = config.linear_shape
        self.widths = [config.conv_channels, H * V, H, H]
        self.to_inner = Projection(d_model, sum(self.widths))

    def forward(self, x_BTD: Tensor, *, start: int = 0, state: RecurrentState | None = None, shared: KV | None = None) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        qkv_BTX, gate, a_BTH, b_BTH = self.to_inner(x_BTD).split(self.widths, dim=-1)
        log_decay_BTH = self.decay_gate(a_BTH).squeeze(-1)
        o_BTHV = self.mix(qkv_BTX, log_decay_BTH, b_BTH.to(log_decay_BTH.dtype).sigmoid(), state)
        y_BTHV = gated_rms_norm(o_BTHV, gate.view(o_BTHV.shape), self.norm.weight, eps=self.norm.eps, activation="silu")
        return self.to_out(y_BTHV.flatten(2)), None
