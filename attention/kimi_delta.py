"""Kimi delta attention (KDA, arXiv 2510.26692): gated DeltaNet whose every key channel forgets at a pace of its own.

    S_t = (I - beta_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    q, k, v = SiLU(conv(x W)), q and k of unit length;  g = -exp(A_log) softplus(x W_down W_up + dt_bias),  beta =
    sigmoid(x W_b) y = W_o(RMSNorm(o) * sigmoid(x W_down' W_up')), the norm per head

Decay and output gate pass through a bottleneck as wide as one head: K for the decay, V for the gate.

Legend: B batch, T tokens, D model width, H heads, G heads of queries and keys (as many), K key width, V value width, X
convolution channels.
"""

from torch import Tensor

from attention.config import AttentionConfig
from attention.delta_layer import DeltaKind, DeltaLayer
from attention.kind import AttentionKind
from attention.layer_states import KV, LayerState, RecurrentState
from attention.positions import Start
from attention.projection import Projection
from triton_kernels.linear.kimi_delta_attention import kimi_delta_attention
from triton_kernels.native import decode_step as native


class KimiDeltaAttention(DeltaLayer):
    """The layer of the formulas above."""

    activation = "sigmoid"

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        H, K, V = config.linear_shape
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers, decay_channels=K)
        # Queries, keys and values before the convolution; the bottlenecks of gate and decay; beta of each head.
        self.widths = [config.conv_channels, V, K, H]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.to_gate = Projection(V, H * V)
        self.to_decay = Projection(K, H * K)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, RecurrentState)
        qkv_BTX, gate_BTV, decay_BTK, b_BTH = self.to_inner(x_BTD).split(self.widths, dim=-1)
        y_BTX = self.mix(qkv_BTX, self.to_gate(gate_BTV), self.to_decay(decay_BTK), b_BTH, state)
        return self.to_out(y_BTX), None

    def describe(self, block: native.NativeBlock, watch: native.Watch, state: LayerState) -> None:
        if type(self) is not KimiDeltaAttention:
            raise native.NotInOneCall(f"a delta rule that is a {type(self).__name__}")
        self.describe_rule(block, watch, state)
        H, K, V = self.config.linear_shape
        block.to_gate, block.to_decay = self.to_gate.describe(watch, V, H * V), self.to_decay.describe(watch, K, H * K)

    def rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        beta_BTH: Tensor,
        initial_state_BHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return kimi_delta_attention(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            log_decay_BTHK,
            beta_BTH,
            normalize_qk=True,
            initial_state_BHKV=initial_state_BHKV,
            chunk_size=self.config.chunk_size,
        )


KIMI_DELTA = DeltaKind(
    letter="K",
    sentence="Kimi delta attention (linear, delta rule, decay per key channel)",
    layer=KimiDeltaAttention,
    state_type=RecurrentState,
)
