"""Gated DeltaNet (arXiv 2412.06464): linear attention whose state is corrected by the delta rule and forgets by a gate
per head.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(K)
    q, k, v = SiLU(conv(x W)), q and k of unit length;  g = -exp(A_log) softplus(x W_a + dt_bias),  beta = sigmoid(x
    W_b) y = W_o(RMSNorm(o) * SiLU(x W_g)), the norm per head

Legend: B batch, T tokens, D model width, H heads, G heads of queries and keys, K key width, V value width, X
convolution channels.
"""

from torch import Tensor

from attention.config import AttentionConfig
from attention.delta_layer import DeltaKind, DeltaLayer
from attention.kind import AttentionKind
from attention.layer_states import KV, LayerState, RecurrentState
from attention.positions import Start
from attention.projection import Projection
from triton_kernels.linear.gated_delta_rule import gated_delta_rule
from triton_kernels.native import decode_step as native


class GatedDeltaNet(DeltaLayer):
    """The layer of the formulas above."""

    activation = "silu"

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers, decay_channels=1)
        H, _, V = config.linear_shape
        # Queries, keys and values before the convolution; output gate; decay and beta of each head.
        self.widths = [config.conv_channels, H * V, H, H]
        self.to_inner = Projection(d_model, sum(self.widths))

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, RecurrentState)
        qkv_BTX, gate_BTX, a_BTH, b_BTH = self.to_inner(x_BTD).split(self.widths, dim=-1)
        return self.to_out(self.mix(qkv_BTX, gate_BTX, a_BTH, b_BTH, state)), None

    def describe(self, block: native.NativeBlock, watch: native.Watch, state: LayerState) -> None:
        if type(self) is not GatedDeltaNet:
            raise native.NotInOneCall(f"a delta rule that is a {type(self).__name__}")
        self.describe_rule(block, watch, state)

    def rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        beta_BTH: Tensor,
        initial_state_BHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return gated_delta_rule(
            q_BTGK,
            k_BTGK,
            v_BTHV,
            log_decay_BTHK.squeeze(-1),
            beta_BTH,
            normalize_qk=True,
            initial_state_BHKV=initial_state_BHKV,
            chunk_size=self.config.chunk_size,
        )


GATED_DELTA_NET = DeltaKind(
    letter="G",
    sentence="gated DeltaNet (linear, delta rule, decay per head)",
    layer=GatedDeltaNet,
    state_type=RecurrentState,
    shares_keys=True,
)
