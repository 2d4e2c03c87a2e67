"""Mixed attention: softmax heads and linear heads side by side in one layer, each seeing the same input.

The softmax heads (full, or in a sliding window) are those of an F or S layer, fewer; the linear heads are those of a
lightning layer:

    y = W_o [softmax heads * sigmoid(x W_g) (optional);  sigmoid(x W_g') * RMSNorm(linear heads)]

The norm over the linear heads brings both kinds to one scale, which Hymba (arXiv 2411.13676), whose heads are of two
kinds too, found necessary.

Legend: B batch, T tokens, D model width, H softmax heads, G key/value heads, J linear heads, K key width, V value
width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention.config import AttentionConfig
from attention.kind import AttentionKind, AttentionLayer
from attention.kv_states import GrowingKV, RingKV
from attention.layer_states import KV, LayerState, RecurrentState, Saved
from attention.lightning import lightning_flops, lightning_slopes
from attention.norm import RMSNorm
from attention.positions import Start, lengths_after, rotary_of, turned
from attention.projection import Projection
from attention.softmax import eight_bit_kv_bytes, kv_state_bytes, new_kv, softmax_flops
from triton_kernels.linear.gated_rms_norm import gated_rms_norm
from triton_kernels.linear.linear_decode import split_heads
from triton_kernels.mixed.mixed_attention import mixed_attention, mixed_decode


class MixedState:
    """Keys and values of the softmax heads (growing or a ring) beside the matrices of the linear heads; both take every
    token."""

    def __init__(self, kv: GrowingKV | RingKV, recurrent: RecurrentState) -> None:
        self.kv = kv
        self.recurrent = recurrent

    @property
    def length(self) -> int:
        return self.kv.length

    @property
    def behind_B(self) -> Tensor | None:
        return self.kv.behind_B

    @property
    def lengths_B(self) -> Tensor:
        return self.kv.lengths_B

    @property
    def max_length(self) -> int:
        return self.kv.max_length

    @property
    def batch_size(self) -> int:
        return self.kv.batch_size

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.kv.tensors | self.recurrent.tensors

    def nbytes(self) -> int:
        return self.kv.nbytes() + self.recurrent.nbytes()

    def reorder(self, index_B: Tensor) -> None:
        self.kv.reorder(index_B)
        self.recurrent.reorder(index_B)

    def refusal_to_crop(self, length: int) -> str | None:
        return self.recurrent.refusal_to_crop(length)

    def crop(self, length: int) -> None:
        self.kv.crop(length)
        self.recurrent.crop(length)

    def joined(self, others: "Sequence[MixedState]") -> "MixedState":
        return MixedState(
            self.kv.joined(cast(Any, [other.kv for other in others])),
            self.recurrent.joined([other.recurrent for other in others]),
        )

    def grow(self, max_length: int) -> None:
        self.kv.grow(max_length)
        self.recurrent.grow(max_length)

    def in_eight_bits(self, name: str) -> "MixedState":
        return MixedState(self.kv.in_eight_bits(name), self.recurrent)

    def save(self) -> Saved:
        kv = self.kv.save()
        return Saved(kv.length, kv.behind_B, kv.tensors | self.recurrent.save().tensors)

    def restore(self, saved: Saved) -> None:
        self.kv.restore(saved)
        self.recurrent.restore(saved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedKind(AttentionKind):
    """M. Its memory is the keys and values of the softmax heads and one matrix per linear head."""

    def check(self, config: AttentionConfig) -> None:
        # Read for its refusals: not every number of heads can be shared between two kinds, and only this layer minds.
        _ = config.mixed_heads
        for name in ("qk_norm_whole", "unit_offset", "qkv_bias", "out_bias", "head_gate", "yarn", "softmax_scale"):
            if value := getattr(config, name):
                legal = None if name in ("yarn", "softmax_scale") else False
                raise ValueError(f"AttentionConfig.{name}: {value}; legal in a mixed layer (M): {legal}")

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> MixedState:
        (_, G, J), (_, K, V) = config.mixed_heads, config.linear_shape
        kv = new_kv(
            config.mixed_window,
            (G, config.head_dim),
            batch_size=batch_size,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )
        return MixedState(kv, RecurrentState(batch_size, max_length, (J, K, V), None, dtype, device))

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """Those of an F or S layer and of a lightning layer, each with its share of the heads."""
        (_, G, J), (_, K, V) = config.mixed_heads, config.linear_shape
        kv = kv_state_bytes(config.mixed_window, (G, config.head_dim), length, element_size)
        return kv + RecurrentState.matrix_bytes((J, K, V))

    def eight_bit_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        (_, G, J), (_, K, V) = config.mixed_heads, config.linear_shape
        kv = eight_bit_kv_bytes(config.mixed_window, (G, config.head_dim), length)
        return kv + RecurrentState.matrix_bytes((J, K, V))

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        (H, _, J), (_, K, V) = config.mixed_heads, config.linear_shape
        linear = lightning_flops((J, K, V), config.chunk_size, length)
        return linear + softmax_flops(H, config.head_dim, config.mixed_window, length)


class MixedAttention(AttentionLayer):
    """The layer of the formula above."""

    log_decay_J: Tensor

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        (H, G, J), (_, linear_K, linear_V), K = config.mixed_heads, config.linear_shape, config.head_dim
        self.linear_shape = (J, linear_K, linear_V)
        # Queries, output gate, keys and values of the softmax heads; then queries, keys and values, and the output
        # gate, of the linear heads.
        gate_width = H * K if config.output_gate else 0
        self.widths = [H * K, gate_width, G * K, G * K, J * (2 * linear_K + linear_V), J * linear_V]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.to_out = Projection(H * K + J * linear_V, d_model, gain=self.output_gain)
        self.q_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.sink_H = nn.Parameter(torch.zeros(H)) if config.sink_logits else None
        self.norm = RMSNorm(J * linear_V, eps=config.norm_eps)
        self.register_buffer("log_decay_J", -lightning_slopes(J, layer_index, n_layers), persistent=False)

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        if self.sink_H is not None:
            nn.init.zeros_(self.sink_H)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, MixedState)
        B, T, _ = x_BTD.shape
        q, gate, k, v, linear_qkv, linear_gate = self.to_inner(x_BTD).split(self.widths, dim=-1)
        q_BTHK, k_BTGK, v_BTGK = (y.view(B, T, -1, self.config.head_dim) for y in (q, k, v))
        rotary = rotary_of(start, T, rotary_dim=self.config.rotary_dim, base=self.config.rope_base, device=x_BTD.device)
        q_BTHK, k_BTGK = (turned(x, rotary, start) for x in (self.q_norm(q_BTHK), self.k_norm(k_BTGK)))
        kv = KV(k_BTGK, v_BTGK) if state is None else state.kv.update(k_BTGK, v_BTGK)
        if state is not None and T == 1:
            o_BHK, linear_o_BJV = mixed_decode(
                q_BTHK[:, 0],
                *kv,
                lengths_after(start, B, x_BTD.device),
                linear_qkv[:, 0],
                self.log_decay_J,
                state_BJKV=state.recurrent.state_BHKV,
                sinks_H=self.sink_H,
            )
            o_BTHK, linear_o_BTJV = o_BHK[:, None], linear_o_BJV[:, None]
            # The op has moved the matrices in place; only the count is left to bring up to date.
            state.recurrent.length += 1
        else:
            o_BTHK, linear_o_BTJV, last_BJKV = mixed_attention(
                q_BTHK,
                *kv,
                *split_heads(functional.silu(linear_qkv), self.linear_shape),
                self.log_decay_J,
                window=self.config.mixed_window,
                sinks_H=self.sink_H,
                initial_state_NJKV=None if state is None else state.recurrent.state_BHKV,
                chunk_size=self.config.chunk_size,
            )
            if state is not None:
                state.recurrent.update(T, last_BJKV)
        o_BTX = o_BTHK.flatten(2)
        if self.config.output_gate:
            o_BTX = o_BTX * gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid().to(o_BTX.dtype)
        linear_o_BTX = gated_rms_norm(
            linear_o_BTJV.flatten(2), linear_gate, self.norm.weight, eps=self.norm.eps, activation="sigmoid"
        )
        return self.to_out(torch.cat([o_BTX, linear_o_BTX], dim=-1)), None


MIXED = MixedKind(
    letter="M",
    sentence="mixed: softmax heads (full or sliding) and lightning heads side by side",
    layer=MixedAttention,
    state_type=MixedState,
)
