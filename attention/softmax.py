"""Softmax attention: full or in a sliding window, with keys and values of its own (F, S) or another layer's (R, r).

Grouped key/value heads (GQA, arXiv 2305.13245), RMSNorm of query and key heads (QK-norm), rotary positions, optionally
a sigmoid output gate (arXiv 2505.06708) and a sink logit per head (arXiv 2508.10925). Sharing keys and values between
layers: arXiv 2405.12981, 2412.01253.

Legend: B batch, T tokens, S keys, D model width, H query heads, G key/value heads, K head width.
"""

import torch
from torch import Tensor, nn

from attention.config import AttentionConfig
from attention.layer import AttentionLayer
from attention.layer_states import KV, Alias, GrowingKV, RingKV
from attention.norm import RMSNorm
from attention.plan import OWNER
from attention.projection import Projection
from triton_kernels.softmax.flash_attention import flash_attention
from triton_kernels.softmax.rotary import rotary_tables, rotate

STATE_TYPES = {"F": GrowingKV, "S": RingKV, "R": Alias, "r": Alias}


class SoftmaxAttention(AttentionLayer):
    """F, S, R or r. A layer that reuses keys and values has a query and an output projection only."""

    def __init__(self, letter: str, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int) -> None:
        super().__init__(letter, d_model=d_model, layer_index=layer_index, n_layers=n_layers)
        self.config = config
        self.state_type = STATE_TYPES[letter]
        self.owns_kv = letter not in OWNER
        self.window = config.window if letter in "Sr" else None
        H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
        # Queries, then the output gate, then keys and values: one product for all of them.
        self.widths = [H * K, H * K if config.output_gate else 0, *([G * K, G * K] if self.owns_kv else [0, 0])]
        self.to_inner = Projection(d_model, sum(self.widths))
        self.to_out = Projection(H * K, d_model, gain=self.output_gain)
        self.q_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, eps=config.norm_eps) if config.qk_norm and self.owns_kv else nn.Identity()
        self.sink_H = nn.Parameter(torch.zeros(H)) if config.sink_logits else None

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        if self.sink_H is not None:
            nn.init.zeros_(self.sink_H)

    def forward(
        self, x_BTD: Tensor, *, start: int = 0, state=None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        self.check_call(x_BTD, start, state)
        B, T, _ = x_BTD.shape
        K = self.config.head_dim
        q, gate, k, v = self.to_inner(x_BTD).split(self.widths, dim=-1)
        position_T = torch.arange(start, start + T, device=x_BTD.device)
        rotary = rotary_tables(position_T, rotary_dim=self.config.rotary_dim, base=self.config.rope_base)
        if self.owns_kv:
            if shared is not None:
                raise self.refuse(
                    "was given the keys and values of another layer; legal: shared=None, only R and r reuse them"
                )
            # Keys are turned here, before they are cached and shared; queries inside the attention, which is all that
            # reads them.
            kv = KV(rotate(self.k_norm(k.view(B, T, -1, K)), rotary), v.view(B, T, -1, K))
            kv = state.update(*kv) if state is not None else kv
        else:
            kv = self._check_shared(shared, B, T, state)
        q_BTHK = self.q_norm(q.view(B, T, -1, K))
        o_BTHK = flash_attention(q_BTHK, kv.k_BSGK, kv.v_BSGV, window=self.window, sinks_H=self.sink_H, rotary=rotary)
        o_BTX = o_BTHK.flatten(2)
        if self.config.output_gate:
            o_BTX = o_BTX * gate.to(torch.promote_types(gate.dtype, torch.float32)).sigmoid().to(o_BTX.dtype)
        return self.to_out(o_BTX), kv if self.owns_kv else None

    def _check_shared(self, shared: KV | None, B: int, T: int, state: Alias | None) -> KV:
        if shared is None:
            raise self.refuse(
                f"shared is missing; legal: the keys and values that the {OWNER[self.letter]} layer below returned for"
                " these tokens"
            )
        S = shared.k_BSGK.shape[1]
        if shared.k_BSGK.shape[0] != B or S < T or (state is None and S != T):
            raise self.refuse(
                f"shared keys of shape {tuple(shared.k_BSGK.shape)} for {B} x {T} tokens; legal: those of the same call"
            )
        return shared
