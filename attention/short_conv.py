"""Gated short convolution (LFM2, arXiv 2511.23404): a layer that remembers a few tokens and nothing else.

    y_t = W_o (g_t * sum_{w < W} weight[:, w] z_{t - (W - 1) + w}),  z = b * u,  b, g, u = x W_b, x W_g, x W_u

There is no activation: the two gates are all that is not linear.

Legend: B batch, T tokens, D model width, X channels, W convolution width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.decay_gate import uniform
from attention.kind import AttentionKind, AttentionLayer
from attention.layer_states import KV, FixedState, LayerState
from attention.positions import Start
from attention.projection import Projection
from triton_kernels.linear.causal_conv1d import causal_conv1d


class ConvolutionTail(FixedState):
    """The last W - 1 inputs of a convolution that is a layer of its own.

    Args:
        batch_size: sequences side by side.
        max_length: tokens of each that the cache is for; memory does not depend on it.
        conv: channels and width W.
        dtype: of the inputs.
        device: where they lie.
    """

    forgetting = "the tail of a convolution has lost all inputs but the last few"

    def __init__(
        self, batch_size: int, max_length: int, conv: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        channels, width = conv
        super().__init__(max_length, tail=torch.zeros((batch_size, channels, width - 1), dtype=dtype, device=device))

    @property
    def tail_BXW(self) -> Tensor:
        return self.tensors["tail"]

    def update(self, n_tokens: int, tail_BXW: Tensor) -> None:
        """Replaces the tail by the one after `n_tokens` more tokens."""
        self._check("tail", tail_BXW)
        self.tensors["tail"].copy_(tail_BXW.detach())
        self.length += n_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvKind(AttentionKind):
    """C. Its memory is the last W - 1 inputs of every channel."""

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> ConvolutionTail:
        return ConvolutionTail(batch_size, max_length, (config.short_conv_channels, config.conv_width), dtype, device)

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """X (W - 1) element_size bytes, whatever the length."""
        return config.short_conv_channels * (config.conv_width - 1) * element_size

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        """None: the convolution's weights count as a product's, and the gates are no products."""
        return 0.0


class ShortConvolution(AttentionLayer):
    """The layer of the formula above."""

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        X = config.short_conv_channels
        # The gate before the convolution, the one behind it, and what both gate.
        self.widths = [X, X, X]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.conv_XW = nn.Parameter(torch.zeros(X, config.conv_width))
        self.to_out = Projection(X, d_model, gain=self.output_gain)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        bound = self.config.conv_width**-0.5
        with torch.no_grad():
            self.conv_XW.copy_(uniform(self.conv_XW.shape, -bound, bound, generator))

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, ConvolutionTail)
        before_BTX, behind_BTX, u_BTX = self.to_inner(x_BTD).split(self.widths, dim=-1)
        mixed_BTX, tail_BXW = causal_conv1d(
            before_BTX * u_BTX,
            self.conv_XW.to(x_BTD.dtype),
            activation=None,
            initial_tail=None if state is None else state.tail_BXW,
        )
        if state is not None:
            state.update(x_BTD.shape[1], tail_BXW)
        return self.to_out(behind_BTX * mixed_BTX), None


SHORT_CONV = ShortConvKind(
    letter="C",
    sentence="gated short convolution (the last few tokens only)",
    layer=ShortConvolution,
    state_type=ConvolutionTail,
)
