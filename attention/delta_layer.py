"""What the layers with a delta rule (G, K) share: short convolution, recurrence and gated norm, from a cache or without
one; and the facts of their kinds.

Legend: B batch, T tokens, H heads, G heads of queries and keys, K key width, V value width, X convolution channels, W
convolution width.
"""

import dataclasses

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.decay_gate import DecayGate, uniform
from attention.kind import AttentionKind, AttentionLayer
from attention.layer_states import LayerState, RecurrentState
from attention.norm import RMSNorm, describe_norm
from attention.projection import Projection
from triton_kernels.linear.causal_conv1d import causal_conv1d
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.linear_decode import delta_decode, linear_attention_step
from triton_kernels.native import decode_step as native


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaKind(AttentionKind):
    """A kind whose memory is one fp32 K x V matrix per head and the last W - 1 inputs of the convolution.

    Attributes:
        shares_keys: whether a head of queries and keys may serve several heads of values.
    """

    shares_keys: bool = False
    in_c: bool = True

    def check(self, config: AttentionConfig) -> None:
        if not self.shares_keys and config.key_heads != config.linear_shape[0]:
            raise ValueError(
                f"AttentionConfig.linear_key_heads: {config.linear_key_heads}; legal in a layer of kind {self.letter}:"
                f" linear_heads = {config.linear_shape[0]}, or None"
            )

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> RecurrentState:
        conv = (config.conv_channels, config.conv_width)
        return RecurrentState(batch_size, max_length, config.linear_shape, conv, dtype, device)

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """4 H K V + X (W - 1) element_size bytes, whatever the length."""
        tail = config.conv_channels * (config.conv_width - 1) * element_size
        return RecurrentState.matrix_bytes(config.linear_shape) + tail

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        heads, key, value = config.linear_shape
        chunk = min(config.chunk_size, length)
        # Inside a chunk: k k^T, q k^T and W = T K (K wide), U = T V and P N (V wide), the triangular inverse; on the
        # state: W S, Q S, K^T N.
        return heads * (4 * key * value + 2 * key * value + 2 * chunk * (3 * key + 2 * value) + 2 * chunk**2 / 3)


class DeltaLayer(AttentionLayer):
    """Base of G and K, which add their projections and choose the rule.

    Args:
        decay_channels: log-decays per head: one, or one for every key channel.
        kind: as in `AttentionLayer`, and so the others.

    Attributes:
        activation: of the output gate.
        widths: of the parts of `to_inner`.
    """

    activation: str
    widths: list[int]

    def __init__(
        self,
        kind: AttentionKind,
        config: AttentionConfig,
        *,
        d_model: int,
        layer_index: int,
        n_layers: int,
        decay_channels: int,
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        H, _, V = config.linear_shape
        self.conv_XW = nn.Parameter(torch.zeros(config.conv_channels, config.conv_width))
        self.decay_gate = DecayGate(H, decay_channels, config.decay_bound)
        self.norm = RMSNorm(V, eps=config.norm_eps)
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        self.decay_gate.draw(generator)
        bound = self.config.conv_width**-0.5
        with torch.no_grad():
            self.conv_XW.copy_(uniform(self.conv_XW.shape, -bound, bound, generator))

    def rule(
        self,
        q_BTGK: Tensor,
        k_BTGK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        beta_BTH: Tensor,
        initial_state_BHKV: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over many tokens, with queries and keys brought to unit length.

        Args:
            log_decay_BTHK: fp32 and at most 0; K is 1 where a head forgets as a whole.

        Returns:
            o_BTHV and the state after the last token, fp32 [B, H, K, V].
        """
        raise NotImplementedError

    def mix(
        self, qkv_BTX: Tensor, gate_BTX: Tensor, a_BTX: Tensor, b_BTH: Tensor, state: RecurrentState | None
    ) -> Tensor:
        """From the projections to the input of the output projection [B, T, H * V]; brings the state up to date."""
        (B, T, _), (H, K, V) = qkv_BTX.shape, self.config.linear_shape
        gate_BTHV = gate_BTX.view(B, T, H, V)
        if state is not None and T == 1 and self._known_to_one_op:
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
            # The op has moved matrices and tail in place; only the count is left to bring up to date.
            state.length += 1
            return y_BHV.view(B, 1, H * V)
        tail = None if state is None else state.tail_BXW
        qkv_BTX, tail = causal_conv1d(qkv_BTX, self.conv_XW.to(qkv_BTX.dtype), activation="silu", initial_tail=tail)
        q, k, v = qkv_BTX.split(self.config.conv_widths, dim=-1)
        q_BTGK, k_BTGK, v_BTHV = q.view(B, T, -1, K), k.view(B, T, -1, K), v.view(B, T, H, V)
        log_decay = self.decay_gate(a_BTX)
        # In the decay's fp32: what a token writes is corrected by what the state holds, and errors would add up.
        beta_BTH = b_BTH.to(log_decay.dtype).sigmoid() * (2.0 if self.config.negative_eigenvalues else 1.0)
        if state is not None and T == 1:
            one = (x[:, 0] for x in (q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH))
            o_BHV, last_BHKV = linear_attention_step(*one, state.state_BHKV, normalize_qk=True)
            o_BTHV = o_BHV[:, None]
        else:
            past_BHKV = None if state is None else state.state_BHKV
            o_BTHV, last_BHKV = self.rule(q_BTGK, k_BTGK, v_BTHV, log_decay, beta_BTH, past_BHKV)
        if state is not None:
            state.update(T, last_BHKV, tail)
        return gated_rms_norm(
            o_BTHV, gate_BTHV, self.norm.weight, eps=self.norm.eps, activation=self.activation
        ).flatten(2)

    @property
    def _known_to_one_op(self) -> bool:
        """Whether the ops that take one token through the whole layer know its options."""
        config = self.config
        plain = not config.negative_eigenvalues and config.decay_bound is None
        return plain and config.key_heads == config.linear_shape[0]

    def describe_rule(self, block: native.NativeBlock, watch: native.Watch, state: LayerState) -> None:
        """What G and K have in common of `describe`."""
        if type(state) is not RecurrentState or type(self.decay_gate) is not DecayGate:
            raise native.NotInOneCall(f"a delta rule with a {type(state).__name__}")
        if not self._known_to_one_op:
            raise native.NotInOneCall("a delta rule with shared keys, negative eigenvalues or bounded decays")
        (H, K, V), X, W = self.config.linear_shape, self.config.conv_channels, self.config.conv_width
        self.describe_projections(block, watch, (H, K, V), sum(self.widths))
        watch.module(self.decay_gate)
        channels = self.decay_gate.dt_bias.numel()
        block.mixer, block.taps = native.DELTA, W
        block.per_channel, block.use_silu = channels == H * K, self.activation == "silu"
        block.conv = watch.parameter(self, "conv_XW", X, W)
        block.A_log = watch.parameter(self.decay_gate, "A_log_H", H)
        block.dt_bias = watch.parameter(self.decay_gate, "dt_bias", channels)
        block.norm = describe_norm(self.norm, watch, width=V, eps=self.config.norm_eps)
        watch.same(state, "tensors")
        block.state = watch.tensor(state.tensors, "state", (watch.batch_size, H, K, V))
        block.tail = watch.tensor(state.tensors, "tail", (watch.batch_size, X, W - 1), native.ACTIVATIONS)
        block.bf16 = state.tail_BXW.dtype == torch.bfloat16
