"""What the layers with a delta rule (G, K) share: a short convolution, then the recurrence, from a cache or without one.

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
from triton_kernels.causal_conv1d import causal_conv1d


class DeltaLayer(AttentionLayer):
    """Base of G and K. Their memory is one K x V matrix per head and the last W - 1 inputs of the convolution.

    Args:
        rule, rule_step: the op for many tokens and for one.
        decay_channels: log-decays per head: one, or one for every key channel.
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
        rule_step: Callable[..., tuple[Tensor, Tensor]],
        decay_channels: int,
    ) -> None:
        super().__init__(letter, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.config = config
        self.rule, self.rule_step = rule, rule_step
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

    def mix(self, qkv_BTX: Tensor, log_decay: Tensor, beta_BTH: Tensor, state: RecurrentState | None) -> Tensor:
        """Convolution, SiLU and delta rule on the projected queries, keys and values; returns o_BTHV and brings the state up to date."""
        (B, T, _), (H, K, V) = qkv_BTX.shape, self.config.linear_shape
        tail = None if state is None else state.tail_BXW
        qkv_BTX, tail = causal_conv1d(qkv_BTX, self.conv_XW.to(qkv_BTX.dtype), activation="silu", initial_tail=tail)
        q, k, v = qkv_BTX.split([H * K, H * K, H * V], dim=-1)
        inputs = (q.view(B, T, H, K), k.view(B, T, H, K), v.view(B, T, H, V), log_decay, beta_BTH)
        if state is None:
            o_BTHV, _ = self.rule(*inputs, normalize_qk=True, chunk_size=self.config.chunk_size)
            return o_BTHV
        if T == 1:
            o_BHV, last_BHKV = self.rule_step(*(x[:, 0] for x in inputs), state.state_BHKV, normalize_qk=True)
            o_BTHV = o_BHV[:, None]
        else:
            o_BTHV, last_BHKV = self.rule(*inputs, normalize_qk=True, initial_state_BHKV=state.state_BHKV, chunk_size=self.config.chunk_size)
        state.update(T, last_BHKV, tail)
        return o_BTHV
