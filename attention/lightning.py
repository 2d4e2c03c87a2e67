"""Lightning attention: linear attention with a fixed decay per head and layer (arXiv 2401.04658, as in MiniMax-01,
arXiv 2501.08313).

    S_t = e^{-s_h} S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  q, k, v = SiLU(x W),  y = W_o(sigmoid(x W_g) * RMSNorm(o))
    s_h = (2^{-8/H})^{h+1} (1 - l / (L - 1 + 1e-5) + 1e-5)

There is no denominator: the norm, over all heads together, takes the scale out. The current token is included.

Legend: B batch, T tokens, D model width, H heads, K key width, V value width.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from attention.config import AttentionConfig
from attention.kind import AttentionKind, AttentionLayer
from attention.layer_states import KV, LayerState, RecurrentState
from attention.norm import RMSNorm, describe_norm
from attention.positions import Start
from attention.projection import Projection
from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.linear_decode import lightning_decode
from triton_kernels.native import decode_step as native


def lightning_slopes(n_heads: int, layer_index: int, n_layers: int) -> Tensor:
    """s_h of the formula above, fp32 [H]: head 0 forgets fastest, and layers forget more slowly the higher they are."""
    head_H = torch.arange(1, n_heads + 1, dtype=torch.float64)
    depth = 1 - layer_index / (n_layers - 1 + 1e-5) + 1e-5
    return (2.0 ** (-8 / n_heads * head_H) * depth).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningKind(AttentionKind):
    """L. Its memory is one fp32 K x V matrix per head, whatever the length."""

    in_c: bool = True

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentState:
        return RecurrentState(batch_size, max_length, config.linear_shape, None, dtype, device)

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """4 H K V bytes."""
        return RecurrentState.matrix_bytes(config.linear_shape)

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        return lightning_flops(config.linear_shape, config.chunk_size, length)


def lightning_flops(shape: tuple[int, int, int], chunk_size: int, length: int) -> int:
    """FLOPs per token of the chunked form: writing and reading the state, then q k^T and its product with v inside a
    chunk.

    Args:
        shape: heads, key width and value width.
    """
    heads, key, value = shape
    chunk = min(chunk_size, length)
    return heads * (4 * key * value + 2 * chunk * (key + value))


class LightningAttention(AttentionLayer):
    """The layer of the formulas above."""

    log_decay_H: Tensor

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        H, K, V = config.linear_shape
        self.to_inner = Projection(d_model, 2 * H * (K + V))
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)
        self.norm = RMSNorm(H * V, eps=config.norm_eps)
        self.register_buffer("log_decay_H", -lightning_slopes(H, layer_index, n_layers), persistent=False)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, RecurrentState)
        B, T, _ = x_BTD.shape
        H, K, V = self.config.linear_shape
        qkv, gate = self.to_inner(x_BTD).split([H * (2 * K + V), H * V], dim=-1)
        if state is not None and T == 1:
            o_BTHV = lightning_decode(qkv[:, 0], self.log_decay_H, state_BHKV=state.state_BHKV)[:, None]
            state.length += 1
        else:
            q, k, v = functional.silu(qkv).split([H * K, H * K, H * V], dim=-1)
            o_BTHV, last_BHKV = decayed_linear_attention(
                q.view(B, T, H, K),
                k.view(B, T, H, K),
                v.view(B, T, H, V),
                self.log_decay_H,
                initial_state_BHKV=None if state is None else state.state_BHKV,
                chunk_size=self.config.chunk_size,
            )
            if state is not None:
                state.update(T, last_BHKV)
        o_BTX = gated_rms_norm(o_BTHV.flatten(2), gate, self.norm.weight, eps=self.norm.eps, activation="sigmoid")
        return self.to_out(o_BTX), None

    def describe(self, block: native.NativeBlock, watch: native.Watch, state: LayerState) -> None:
        if type(self) is not LightningAttention or type(state) is not RecurrentState:
            raise native.NotInOneCall(f"lightning attention that is a {type(self).__name__}")
        H, K, V = self.config.linear_shape
        self.describe_projections(block, watch, (H, K, V), 2 * H * (K + V))
        block.mixer = native.LIGHTNING
        block.norm = describe_norm(self.norm, watch, width=H * V, eps=self.config.norm_eps)
        block.log_decay = watch.buffer(self, "log_decay_H", H)
        watch.same(state, "tensors")
        block.state = watch.tensor(state.tensors, "state", (watch.batch_size, H, K, V))


LIGHTNING = LightningKind(
    letter="L",
    sentence="lightning attention (linear, fixed decay)",
    layer=LightningAttention,
    state_type=RecurrentState,
)
