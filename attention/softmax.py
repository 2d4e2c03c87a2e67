"""Softmax attention: full or in a sliding window, with keys and values of its own (F, S) or another layer's (R, r).

Grouped key/value heads (GQA, arXiv 2305.13245), RMSNorm of query and key heads (QK-norm), rotary positions, optionally
a sigmoid output gate (arXiv 2505.06708) and a sink logit per head (arXiv 2508.10925). Sharing keys and values between
layers: arXiv 2405.12981, 2412.01253.

Legend: B batch, T tokens, S keys, D model width, H query heads, G key/value heads, K head width.
"""

import dataclasses
from functools import partial

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.kind import AttentionKind, AttentionLayer
from attention.kv_states import EightBits, GrowingKV, RingKV
from attention.layer_states import KV, Alias, LayerState
from attention.norm import RMSNorm, describe_norm
from attention.positions import Start, lengths_after, rotary_of, turned
from attention.projection import Projection
from triton_kernels.native import decode_step as native
from triton_kernels.native.library import is_native
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode
from triton_kernels.softmax.native import rotary_at, softmax_decode_native


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxKind(AttentionKind):
    """A kind whose memory is keys and values.

    Attributes:
        sliding: whether a query sees the last `AttentionConfig.window` tokens only, and no more are kept.
    """

    sliding: bool
    in_c: bool = True

    def window(self, config: AttentionConfig) -> int | None:
        """How many tokens a query sees, its own included; None for all."""
        return config.window if self.sliding else None

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> GrowingKV | RingKV:
        heads = (config.n_kv_heads, config.head_dim)
        return new_kv(
            self.window(config), heads, batch_size=batch_size, max_length=max_length, dtype=dtype, device=device
        )

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """2 G K element_size bytes per token, of `length` tokens or of the window if that is shorter."""
        return kv_state_bytes(self.window(config), (config.n_kv_heads, config.head_dim), length, element_size)

    def eight_bit_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """2 G (K + 4) bytes per token."""
        return eight_bit_kv_bytes(self.window(config), (config.n_kv_heads, config.head_dim), length)

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        return softmax_flops(config.n_heads, config.head_dim, self.window(config), length)


def new_kv(
    window: int | None,
    heads: tuple[int, int],
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> GrowingKV | RingKV:
    """Memory for the keys and values of all tokens, or of the last `window`.

    Args:
        heads: G and K.
    """
    if window is None:
        return GrowingKV(batch_size, max_length, heads, dtype, device)
    return RingKV(batch_size, max_length, window, heads, dtype, device)


def kv_state_bytes(window: int | None, heads: tuple[int, int], length: int, element_size: int) -> int:
    """Bytes per sequence of what `new_kv` allocates for `length` tokens."""
    n_kv_heads, head_dim = heads
    kept = length if window is None else min(length, window)
    return 2 * n_kv_heads * head_dim * element_size * kept


def eight_bit_kv_bytes(window: int | None, heads: tuple[int, int], length: int) -> int:
    """The same in 8 bits, with a scale in fp32 for each token and head."""
    n_kv_heads, head_dim = heads
    return kv_state_bytes(window, (n_kv_heads, head_dim + torch.float32.itemsize), length, torch.int8.itemsize)


def softmax_flops(n_heads: int, head_dim: int, window: int | None, length: int) -> float:
    """FLOPs per token of q k^T and p v, averaged over a causal sequence of `length` tokens."""
    reach = min(window or length, length)
    # The first `reach` tokens see 1, 2, ... keys, the others `reach` of them.
    mean_keys = (reach * (reach + 1) / 2 + (length - reach) * reach) / length
    return n_heads * mean_keys * 4 * head_dim


class SoftmaxAttention(AttentionLayer):
    """A layer of any `SoftmaxKind`. One that reuses keys and values has a query and an output projection only."""

    kind: SoftmaxKind

    def __init__(
        self, kind: SoftmaxKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.owns_kv = kind.reads is None
        self.window = kind.window(config)
        H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
        # Queries, then the output gate, then keys and values: one product for all of them.
        gate_width = H * K if config.output_gate else H if config.head_gate else 0
        self.widths = [H * K, gate_width, *([G * K, G * K] if self.owns_kv else [0, 0])]
        self.to_inner = Projection(d_model, sum(self.widths), bias=config.qkv_bias)
        self.to_out = Projection(H * K, d_model, gain=self.output_gain, bias=config.out_bias)
        q_width, k_width = (H * K, G * K) if config.qk_norm_whole else (K, K)
        norm = partial(RMSNorm, eps=config.norm_eps, unit_offset=config.unit_offset)
        self.q_norm = norm(q_width) if config.qk_norm else nn.Identity()
        self.k_norm = norm(k_width) if config.qk_norm and self.owns_kv else nn.Identity()
        self.sink_H = nn.Parameter(torch.zeros(H)) if config.sink_logits else None

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        if self.sink_H is not None:
            nn.init.zeros_(self.sink_H)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        B, T, _ = x_BTD.shape
        if self.owns_kv and shared is not None:
            raise self.refuse(
                "was given the keys and values of another layer; legal: shared=None, this kind has its own"
            )
        q, gate, k, v = self.to_inner(x_BTD).split(self.widths, dim=-1)
        in_c = self._known_in_c and is_native(x_BTD, B, *self._vectors())
        # Keys and values in 8 bits are none that the forms in C know; those of another layer come as they are.
        in_c = in_c and not (self.owns_kv and isinstance(state, EightBits))
        if state is not None and T == 1 and isinstance(start, int) and in_c:
            o_BX, kv = self._decode(q[:, 0], k[:, 0], v[:, 0], state, shared, start)
            return self._out(o_BX[:, None], gate), kv
        config, device = self.config, x_BTD.device
        rotary = rotary_of(
            start, T, rotary_dim=config.rotary_dim, base=config.rope_base, device=device, yarn=config.yarn
        )
        if self.owns_kv:
            # Keys are turned here, before they are cached and shared; queries inside the attention, which is all that
            # reads them.
            kv = KV(turned(self._heads(k, self.k_norm), rotary, start), self._heads(v))
            if state is not None:
                assert isinstance(state, GrowingKV | RingKV)
                kv = state.update(*kv)
        else:
            kv = self._check_shared(shared, B, T, state)
        q_BTHK = self._heads(q, self.q_norm)
        if state is not None and T == 1:
            # The newest token sees all that is kept, in whatever order a ring holds it: there is no window to apply.
            lengths_B = lengths_after(start, B, x_BTD.device)
            q_BHK = turned(q_BTHK, rotary, start)[:, 0]
            o_BHK = flash_decode(q_BHK, *kv, lengths_B, scale=config.softmax_scale, sinks_H=self.sink_H)
            o_BTHK = o_BHK[:, None]
        else:
            o_BTHK = flash_attention(
                q_BTHK,
                *kv,
                window=self.window,
                scale=config.softmax_scale,
                sinks_H=self.sink_H,
                rotary=rotary,
            )
        return self._out(o_BTHK.flatten(2), gate), kv if self.owns_kv else None

    def _heads(self, x_BTX: Tensor, norm: nn.Module | None = None) -> Tensor:
        """A projection [B, T, heads * K] as [B, T, heads, K], normalised whole or head by head."""
        if norm is not None and self.config.qk_norm_whole:
            x_BTX, norm = norm(x_BTX), None
        x_BTHK = x_BTX.unflatten(-1, (-1, self.config.head_dim))
        return x_BTHK if norm is None else norm(x_BTHK)

    @property
    def _known_in_c(self) -> bool:
        """Whether the forms in C know the options of this layer."""
        config = self.config
        plain = not config.qk_norm_whole and not config.head_gate
        return plain and config.yarn is None and config.softmax_scale is None

    def _decode(
        self, q_BX: Tensor, k_BX: Tensor, v_BX: Tensor, state: LayerState, shared: KV | None, start: int
    ) -> tuple[Tensor, KV | None]:
        """What `forward` does for one token between its projections, in one call."""
        row, new_kv = 0, None
        if self.owns_kv:
            assert isinstance(state, GrowingKV | RingKV)
            row, kv = state.next_row(k_BX)
            new_kv = k_BX, v_BX
        else:
            kv = self._check_shared(shared, len(q_BX), 1, state)
        o_BX = softmax_decode_native(
            q_BX,
            new_kv,
            kv,
            row=row,
            q_norm_K=getattr(self.q_norm, "scale", None),
            k_norm_K=getattr(self.k_norm, "scale", None),
            eps=self.config.norm_eps,
            rotary=rotary_at(start, self.config.rotary_dim, self.config.rope_base),
            sinks_H=self.sink_H,
        )
        return o_BX, kv if self.owns_kv else None

    def describe(self, block: native.NativeBlock, watch: native.Watch, state: LayerState) -> None:
        # An R layer writes nothing and reads what its owner has.
        owner = state.owner if isinstance(state, Alias) else state
        if type(self) is not SoftmaxAttention or type(owner) not in (GrowingKV, RingKV):
            raise native.NotInOneCall(f"softmax attention that is a {type(self).__name__}")
        if not self._known_in_c:
            raise native.NotInOneCall("an option of softmax attention")
        H, G, K = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        self.describe_projections(block, watch, (H, K, K), sum(self.widths))
        block.mixer, block.kv_heads, block.half = native.SOFTMAX, G, self.config.rotary_dim // 2
        block.output_gate, block.writes = self.config.output_gate, self.owns_kv
        block.q_norm = describe_norm(self.q_norm, watch, width=K, eps=self.config.norm_eps)
        block.k_norm = describe_norm(self.k_norm, watch, width=K, eps=self.config.norm_eps)
        block.sink = None if self.sink_H is None else watch.parameter(self, "sink_H", H)
        block.rope_base = self.config.rope_base
        watch.same(owner, "tensors")
        keys = owner.tensors["k"]
        block.capacity = keys.shape[1]
        block.cache_stride, block.bf16 = keys.stride(0), keys.dtype == torch.bfloat16
        shape = (watch.batch_size, block.capacity, G, K)
        block.keys = watch.tensor(owner.tensors, "k", shape, native.ACTIVATIONS)
        block.values = watch.tensor(owner.tensors, "v", shape, (keys.dtype,))

    def _vectors(self) -> list[Tensor]:
        """What the layer holds beside its projections, where it has it."""
        own = (getattr(self.q_norm, "scale", None), getattr(self.k_norm, "scale", None), self.sink_H)
        return [x for x in own if x is not None]

    def _out(self, o_BTX: Tensor, gate_BTX: Tensor) -> Tensor:
        if self.config.output_gate or self.config.head_gate:
            wide = torch.promote_types(gate_BTX.dtype, torch.float32)
            gate_BTX = gate_BTX.to(wide).sigmoid().to(o_BTX.dtype)
            if self.config.head_gate:
                gate_BTX = gate_BTX.repeat_interleave(self.config.head_dim, dim=-1)
            o_BTX = o_BTX * gate_BTX
        return self.to_out(o_BTX)

    def _check_shared(self, shared: KV | None, B: int, T: int, state: LayerState | None) -> KV:
        if shared is None:
            raise self.refuse(
                f"shared is missing; legal: the keys and values that the {self.kind.reads} layer below returned for"
                " these tokens"
            )
        S = shared.k_BSGK.shape[1]
        # One token may come with a ring that is shorter than the text, never with fewer keys than tokens.
        if shared.k_BSGK.shape[0] != B or S < T or (state is None and S != T):
            raise self.refuse(
                f"shared keys of shape {tuple(shared.k_BSGK.shape)} for {B} x {T} tokens; legal: those of the same call"
            )
        return shared


# What keys and values look like, and which positions they were turned to, is the owner's choice.
SHARED = ("n_kv_heads", "head_dim", "rope_base", "rotary_fraction", "yarn")

FULL = SoftmaxKind(
    letter="F",
    sentence="full softmax attention",
    layer=SoftmaxAttention,
    state_type=GrowingKV,
    sliding=False,
)
SLIDING = SoftmaxKind(
    letter="S",
    sentence="sliding-window softmax attention",
    layer=SoftmaxAttention,
    state_type=RingKV,
    sliding=True,
)
FULL_SHARED = SoftmaxKind(
    letter="R",
    sentence="full attention that reuses the keys and values of the nearest F below",
    layer=SoftmaxAttention,
    state_type=Alias,
    reads="F",
    shared_fields=SHARED,
    sliding=False,
)
SLIDING_SHARED = SoftmaxKind(
    letter="r",
    sentence="sliding-window attention that reuses the keys and values of the nearest S below",
    layer=SoftmaxAttention,
    state_type=Alias,
    reads="S",
    # The owner's ring has forgotten what a longer window would see, and shows a shorter one too much.
    shared_fields=(*SHARED, "window"),
    sliding=True,
)
