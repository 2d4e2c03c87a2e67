"""Mamba-2 (state-space duality, arXiv 2405.21060): linear attention whose time step, from the token, says both how much
is written and how much is forgotten.

    S_t = e^{-a_h d_t} S_{t-1} + B_t (d_t x_t)^T,  o_t = S_t^T C_t + skip_h x_t,  d = softplus(u W_d + dt_bias)
    C, B, x = SiLU(conv(u W) + bias): query, key and value of the other linear layers; u is the layer's input
    y = W_o RMSNorm(o * SiLU(u W_g)), the norm over the heads of a group together, behind the gate

C and B belong to a group of heads, as keys and values do in grouped-query attention.

Legend: B batch, T tokens, D model width, H heads, G groups, K state width (of C and B), V head width (of x), X
convolution channels, W convolution width.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.config import AttentionConfig
from attention.decay_gate import DecayGate, uniform
from attention.kind import AttentionKind, AttentionLayer
from attention.layer_states import KV, LayerState, RecurrentState
from attention.lightning import lightning_flops
from attention.positions import Start
from attention.projection import Projection
from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.decayed_linear_attention import decayed_linear_attention
from triton_kernels.linear.linear_decode import linear_attention_step


def mamba_widths(config: AttentionConfig) -> tuple[int, int, int]:
    """Channels of C, of B and of x of all heads, which the convolution takes side by side."""
    H, K, V = config.linear_shape
    return config.mamba_groups * K, config.mamba_groups * K, H * V


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Kind(AttentionKind):
    """D. Its memory is one fp32 K x V matrix per head and the last W - 1 inputs of the convolution."""

    def check(self, config: AttentionConfig) -> None:
        heads = config.linear_shape[0]
        if heads % config.mamba_groups != 0:
            raise ValueError(
                f"AttentionConfig.mamba_groups: {config.mamba_groups}; legal: a divisor of the {heads} heads of a"
                " linear layer"
            )

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentState:
        conv = (sum(mamba_widths(config)), config.conv_width)
        return RecurrentState(batch_size, max_length, config.linear_shape, conv, dtype, device)

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """4 H K V + X (W - 1) element_size bytes, whatever the length."""
        tail = sum(mamba_widths(config)) * (config.conv_width - 1) * element_size
        return RecurrentState.matrix_bytes(config.linear_shape) + tail

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        return lightning_flops(config.linear_shape, config.chunk_size, length)


class Mamba2(AttentionLayer):
    """The layer of the formulas above."""

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        H, _, V = config.linear_shape
        X = sum(mamba_widths(config))
        # What the convolution takes; the output gate; the time step of each head.
        self.widths = [X, H * V, H]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.conv_XW = nn.Parameter(torch.zeros(X, config.conv_width))
        self.conv_bias_X = nn.Parameter(torch.zeros(X))
        self.decay_gate = DecayGate(H, 1)
        self.skip_H = nn.Parameter(torch.ones(H))
        self.norm_X = nn.Parameter(torch.ones(H * V))
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        self.decay_gate.draw(generator)
        bound = self.config.conv_width**-0.5
        with torch.no_grad():
            self.conv_XW.copy_(uniform(self.conv_XW.shape, -bound, bound, generator))
            self.conv_bias_X.copy_(uniform(self.conv_bias_X.shape, -bound, bound, generator))
        nn.init.ones_(self.skip_H)
        nn.init.ones_(self.norm_X)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, RecurrentState)
        T, (H, K, V), G = x_BTD.shape[1], self.config.linear_shape, self.config.mamba_groups
        qkv_BTX, gate_BTX, step_BTH = self.to_inner(x_BTD).split(self.widths, dim=-1)
        qkv_BTX, tail_BXW = causal_conv1d(
            qkv_BTX,
            self.conv_XW.to(x_BTD.dtype),
            bias_D=self.conv_bias_X,
            initial_tail=None if state is None else state.tail_BXW,
        )
        q, k, v = qkv_BTX.split(mamba_widths(self.config), dim=-1)
        q_BTGK, k_BTGK, v_BTHV = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))
        # In the fp32 of their parameters: both end up in a sum over the whole text.
        step_BTH = functional.softplus(step_BTH + self.decay_gate.dt_bias).clamp_min(self.config.mamba_step_floor)
        log_decay_BTH = -self.decay_gate.A_log_H.exp() * step_BTH
        written_BTHV = (v_BTHV * step_BTH[..., None]).to(v_BTHV.dtype)
        if state is not None and T == 1:
            o_BHV, last_BHKV = linear_attention_step(
                *(x[:, 0] for x in (q_BTGK, k_BTGK, written_BTHV, log_decay_BTH[..., None])),
                None,
                state.state_BHKV,
                scale=1.0,
            )
            o_BTHV = o_BHV[:, None]
        else:
            o_BTHV, last_BHKV = decayed_linear_attention(
                q_BTGK.repeat_interleave(H // G, dim=2),
                k_BTGK.repeat_interleave(H // G, dim=2),
                written_BTHV,
                log_decay_BTH,
                initial_state_BHKV=None if state is None else state.state_BHKV,
                chunk_size=self.config.chunk_size,
            )
        if state is not None:
            state.update(T, last_BHKV, tail_BXW)
        o_BTHV = o_BTHV + self.skip_H[:, None] * v_BTHV
        return self.to_out(self._gated_norm(o_BTHV.flatten(2), gate_BTX).to(x_BTD.dtype)), None

    def _gated_norm(self, o_BTX: Tensor, gate_BTX: Tensor) -> Tensor:
        """RMSNorm of o * SiLU(gate) in every group of heads, in at least fp32."""
        gated_BTX = o_BTX * functional.silu(gate_BTX.to(o_BTX.dtype))
        grouped = gated_BTX.unflatten(-1, (self.config.mamba_groups, -1))
        return functional.rms_norm(grouped, grouped.shape[-1:], eps=self.config.norm_eps).flatten(-2) * self.norm_X


MAMBA2 = Mamba2Kind(
    letter="D",
    sentence="Mamba-2 (linear, decay per token and head)",
    layer=Mamba2,
    state_type=RecurrentState,
)
