"""What the layers with a delta rule (G, K) share: short convolution, recurrence and gated norm, from a cache or without
one.

Legend: B batch, T tokens, H heads, K key width, V value width, X convolution channels, W convolution width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.decay_gate import DecayGate, uniform
from attention.layer import AttentionLayer
from attention.layer_states import RecurrentState
from attention.norm import RMSNorm
from attention.projection import Projection
from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.linear_decode import delta_decode


class DeltaLayer(AttentionLayer):
    """Base of G and K. Their memory is one K x V matrix per head and the last W - 1 inputs of the convolution.

    Args:
        rule: the recurrence over many tokens, of q, k, v, log_decay_BTHK and beta.
        decay_channels: log-decays per head: one, or one for every key channel.
        activation: of the output gate.
    """

    state_type = RecurrentState

    def __init__(
        self,
        letter: str,
        config: AttentionConfig,
        *,
        d_model: int,
        layer_index: int,
        n_layers: int,
        rule: Callable[..., tuple[Tensor, Tensor]],
        decay_channels: int,
        activation: str,
    ) -> None:
        super().__init__(letter, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.config = config
        self.rule, self.activation = rule, activation
        H, _, V = config.linear_shape
        self.conv_XW = nn.Parameter(torch.zeros(config.conv_channels, config.conv_width))
        self.decay_gate = DecayGate(H, decay_channels)
        self.norm = RMSNorm(V, eps=config.norm_eps)
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        self.decay_gate.draw(generator)
        bound = self.config.conv_width**-0.5
        with torch.no_grad():
            self.conv_XW.copy_(uniform(self.conv_XW.shape, -bound, bound, generator))

    def mix(
        self, qkv_BTX: Tensor, gate_BTX: Tensor, a_BTX: Tensor, b_BTH: Tensor, state: RecurrentState | None
    ) -> Tensor:
        """From the projections to the input of the output projection [B, T, H * V]; brings the state up to date."""
        (B, T, _), (H, K, V) = qkv_BTX.shape, self.config.linear_shape
        gate_BTHV = gate_BTX.view(B, T, H, V)
        if state is not None and T == 1:
            y_BHV = delta_decode(
                *(x[:, 0] for x in (qkv_BTX, gate_BTHV, a_BTX, b_BTH)),
                conv_XW=self.conv_XW,
                A_log_H=self.decay_gate.A_log_H,
                dt_bias=self.decay_gate.dt_bias,
                norm_V=self.norm.weight,
                state_BHKV=state.state_BHKV,
                tail_BXW=state.tail_BXW,
                eps=self.norm.eps,
                activation=self.activation,
            )
            state.length += 1
            return y_BHV.view(B, 1, H * V)
        tail = None if state is None else state.tail_BXW
        qkv_BTX, tail = causal_conv1d(qkv_BTX, self.conv_XW.to(qkv_BTX.dtype), activation="silu", initial_tail=tail)
        q, k, v = qkv_BTX.split([H * K, H * K, H * V], dim=-1)
        log_decay = self.decay_gate(a_BTX)
        inputs = (
            q.view(B, T, H, K),
            k.view(B, T, H, K),
            v.view(B, T, H, V),
            log_decay,
            b_BTH.to(log_decay.dtype).sigmoid(),
        )
        before = None if state is None else state.state_BHKV
        o_BTHV, last_BHKV = self.rule(
            *inputs, normalize_qk=True, chunk_size=self.config.chunk_size, initial_state_BHKV=before
        )
        if state is not None:
            state.update(T, last_BHKV, tail)
        return gated_rms_norm(
            o_BTHV, gate_BTHV, self.norm.weight, eps=self.norm.eps, activation=self.activation
        ).flatten(2)
