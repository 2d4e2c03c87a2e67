"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434): softmax attention whose keys and values are all
made from one narrow latent per token, which is all that is cached.

    c_t = RMSNorm(x_t W_c),  r_t = rotate(x_t W_r): the latent, and key channels that all heads share
    k_th = [r_t; W_k,h c_t],  v_th = W_v,h c_t,  q_th = [rotate(q^r); q^c],  of x_t W_q or of RMSNorm(x_t W_q') W_q
    o_th = sum_s softmax_s(q_th . k_sh / sqrt(R + K)) v_sh,  y = W_o [o_1 ... o_H]

Training and prefill compute k and v of every head. A decode step does not: q^c . (W_k,h c) = (W_k,h^T q^c) . c, so the
query goes to the latent instead, all heads read the same [c; r], and W_v is applied to what comes out (the absorbed
form). Without a position (NoPE, as in Kimi Linear, arXiv 2510.26692) r stays and is not turned.

Legend: B batch, T tokens, S keys, D model width, H heads, K key width without the shared part, R width of the shared
part, V value width, C latent width, X = C + R.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.kind import AttentionKind, AttentionLayer
from attention.layer_states import KV, LayerState, TensorState
from attention.norm import RMSNorm
from attention.positions import Start, lengths_after, rotary_of, turned
from attention.projection import Projection
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.flash_decode import flash_decode


class LatentShape(NamedTuple):
    """H, K, R, V and C of the legend, and how many of the R channels are turned by positions."""

    heads: int
    key: int
    shared: int
    value: int
    latent: int
    turned: int


def latent_shape(config: AttentionConfig) -> LatentShape:
    """The sizes of an A layer; those that are not set stand to each other as in DeepSeek-V2."""
    K = config.head_dim
    shared = K // 2 if config.latent_shared_dim is None else config.latent_shared_dim
    return LatentShape(
        heads=config.n_heads,
        key=K,
        shared=shared,
        value=config.latent_value_dim or K,
        latent=config.latent_dim or 4 * K,
        turned=round(config.rotary_fraction * shared),
    )


class LatentState(TensorState):
    """Latent and shared key channels of every token seen, side by side.

    Args:
        batch_size: sequences side by side.
        max_length: tokens of each that fit.
        width: the X above.
        dtype: of what is kept.
        device: where it lies.
    """

    writes_over = False

    def __init__(self, batch_size: int, max_length: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(max_length, latent=torch.empty((batch_size, max_length, width), dtype=dtype, device=device))

    def update(self, new_BTX: Tensor) -> Tensor:
        """Appends T tokens, one where sequences are behind; returns all so far [B, S, X], as a view."""
        self._check("latent", new_BTX)
        end = self.length + new_BTX.shape[1]
        if self.behind_B is None:
            self.tensors["latent"][:, self.length : end] = new_BTX.detach()
        else:
            self._write_row(self.length - self.behind_B, latent=new_BTX)
        self.length = end
        return self.tensors["latent"][:, :end]

    def grow(self, max_length: int) -> None:
        super().grow(max_length)
        self._lengthen(max_length)

    def refusal_to_crop(self, length: int) -> str | None:
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentKind(AttentionKind):
    """A. Its memory is C + R numbers per token, whatever the number of heads."""

    def check(self, config: AttentionConfig) -> None:
        shape = latent_shape(config)
        turned = config.rotary_fraction * shape.shared
        if abs(turned - shape.turned) > 1e-6 or shape.turned % 2 != 0:
            raise ValueError(
                f"AttentionConfig.latent_shared_dim: {shape.shared}, of which rotary_fraction={config.rotary_fraction}"
                f" turns {turned:g} channels; legal: an even number"
            )

    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> LatentState:
        shape = latent_shape(config)
        return LatentState(batch_size, max_length, shape.latent + shape.shared, dtype, device)

    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """(C + R) element_size bytes per token."""
        shape = latent_shape(config)
        return (shape.latent + shape.shared) * element_size * length

    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        # As training and prefill compute it: q k^T over K + R channels and p v over V, of (length + 1) / 2 keys.
        shape = latent_shape(config)
        return shape.heads * (length + 1) * (shape.key + shape.shared + shape.value)


class LatentAttention(AttentionLayer):
    """The layer of the formulas above."""

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__(kind, config, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.shape = latent_shape(config)
        H, K, R, V, C, _ = self.shape
        Q = config.latent_query_dim
        self.scale = config.latent_scale * (R + K) ** -0.5
        # Queries, or their latent; the latent of keys and values; the key channels that all heads share.
        self.widths = [Q or H * (R + K), C, R]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.q_norm = RMSNorm(Q, eps=config.norm_eps) if Q else nn.Identity()
        self.to_query = Projection(Q, H * (R + K)) if Q else nn.Identity()
        self.kv_norm = RMSNorm(C, eps=config.norm_eps)
        # Keys of all heads, then values.
        self.to_heads = Projection(C, H * (K + V))
        self.to_out = Projection(H * V, d_model, gain=self.output_gain)

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        assert state is None or isinstance(state, LatentState)
        (B, T, _), (H, K, R, V, C, _) = x_BTD.shape, self.shape
        q, latent_BTC, shared_BTR = self.to_inner(x_BTD).split(self.widths, dim=-1)
        # The channels that positions turn come first in queries and keys, where rotary embeddings look for them.
        q_BTHK = self.to_query(self.q_norm(q)).view(B, T, H, R + K)
        config, device = self.config, x_BTD.device
        rotary = rotary_of(
            start, T, rotary_dim=self.shape.turned, base=config.rope_base, device=device, yarn=config.yarn
        )
        latent_BTC, shared_BTR = self.kv_norm(latent_BTC), turned(shared_BTR[:, :, None], rotary, start)[:, :, 0]
        if config.latent_gain != 1.0:
            latent_BTC = latent_BTC * config.latent_gain
        if state is not None:
            seen_BSX = state.update(torch.cat([latent_BTC, shared_BTR], dim=-1))
            if T == 1:
                lengths_B = lengths_after(start, B, x_BTD.device)
                o_BHV = self._absorbed(turned(q_BTHK, rotary, start)[:, 0], seen_BSX, lengths_B)
                return self.to_out(o_BHV.reshape(B, 1, H * V)), None
            latent_BTC, shared_BTR = seen_BSX.split([C, R], dim=-1)
        key_BSHK, value_BSHV = self.to_heads(latent_BTC).split([H * K, H * V], dim=-1)
        shared_BSHR = shared_BTR[:, :, None].expand(-1, -1, H, -1)
        o_BTHV = flash_attention(
            q_BTHK,
            torch.cat([shared_BSHR, key_BSHK.unflatten(-1, (H, K))], dim=-1),
            value_BSHV.unflatten(-1, (H, V)),
            scale=self.scale,
            rotary=rotary,
        )
        return self.to_out(o_BTHV.flatten(2)), None

    def _absorbed(self, q_BHK: Tensor, seen_BSX: Tensor, lengths_B: Tensor) -> Tensor:
        """Attention of the newest token's queries, turned already, on the latents themselves: o_BHV."""
        H, K, R, V, C, _ = self.shape
        weight = self.to_heads.weight.to(q_BHK.dtype)
        key_HKC, value_HVC = weight[: H * K].view(H, K, C), weight[H * K :].view(H, V, C)
        turned_BHR, plain_BHK = q_BHK.split([R, K], dim=-1)
        q_BHX = torch.cat([torch.einsum("bhk,hkc->bhc", plain_BHK, key_HKC), turned_BHR], dim=-1)
        seen_BS1X = seen_BSX[:, :, None]
        o_BHC = flash_decode(q_BHX, seen_BS1X, seen_BS1X[..., :C], lengths_B, scale=self.scale)
        return torch.einsum("bhc,hvc->bhv", o_BHC, value_HVC)


LATENT = LatentKind(
    letter="A",
    sentence="multi-head latent attention (softmax, one cached latent for all heads)",
    layer=LatentAttention,
    state_type=LatentState,
)
