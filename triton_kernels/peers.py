"""The same ops through other libraries and as plain formulas: what `bench --peers` times and `inspect --peer` compiles beside ours.

Each takes the tensors its op's `Operation.inputs` draws and returns the op's first output; it imports its library itself, so that a peer that is not
installed costs nothing but its row. None of them is a dependency.

Letters: B batch, T queries, S keys, H query (or value) heads, G key/value (or query/key) heads, K key width, V value width, D channels, W width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.decayed_linear_attention_torch import decayed_linear_attention_recurrence, token_log_decay
from triton_kernels.gated_delta_rule_torch import gated_delta_rule_recurrence

# Nothing here is installed for the type checker.
# pyright: reportMissingImports=false


def fla_simple_gla(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    gate = {"g_gamma" if log_decay.dim() == 1 else "g": log_decay}
    return chunk_simple_gla(q_BTHK, k_BTHK, v_BTHV, scale=scale, **gate)[0]


def transformers_lightning(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """The attention of transformers' MiniMax layer alone: its projections, norm and output gate are replaced by what passes its input through."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class Open(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_full((), 40.0)

    heads, width = q_BTHK.shape[2:]
    layer: Any = MiniMaxLightningAttention(MiniMaxConfig(hidden_size=width, num_attention_heads=heads, head_dim=width), layer_idx=0)
    layer.act_fn = layer.qkv_proj = layer.norm = layer.out_proj = torch.nn.Identity()
    layer.output_gate = Open()
    layer.slope_rate = -log_decay[:, None, None].to(q_BTHK.dtype)
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    packed = torch.cat((q_BTHK * scale, k_BTHK, v_BTHV), -1).flatten(2)
    return layer(packed, None, None)[0].view_as(v_BTHV)


def loop_linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """The recurrence, token by token in fp32."""
    q, k, v, g = (x.float() for x in (q_BTHK, k_BTHK, v_BTHV, token_log_decay(log_decay, q_BTHK)))
    initial = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
    return decayed_linear_attention_recurrence(q, k, v, g, initial, scale=scale)[0].to(v_BTHV.dtype)


def fla_delta(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, normalize_qk: bool) -> Tensor:
    """Plain, gated or Kimi delta attention, by the axes of the decay."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    if log_decay is None:
        return chunk_delta_rule(q_BTGK, k_BTGK, v_BTHV, beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]
    chunked = chunk_gated_delta_rule if log_decay.dim() == 3 else chunk_kda
    return chunked(q_BTGK, k_BTGK, v_BTHV, g=log_decay, beta=beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]


def transformers_delta(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta_BTH: Tensor, normalize_qk: bool) -> Tensor:
    """The torch implementations of Qwen3-Next (gated) and Kimi Linear (a decay per channel), which repeat shared heads beforehand."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    chunked = torch_chunk_gated_delta_rule if log_decay.dim() == 3 else chunk_kimi_delta_attention
    q_BTHK, k_BTHK = repeat_heads(v_BTHV.shape[2], q_BTGK, k_BTGK)
    return chunked(q_BTHK, k_BTHK, v_BTHV, log_decay, beta_BTH, use_qk_l2norm_in_kernel=normalize_qk)[0]


def loop_delta(q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, normalize_qk: bool) -> Tensor:
    """The recurrence, token by token in fp32."""
    q, k = (x.float() for x in repeat_heads(v_BTHV.shape[2], q_BTGK, k_BTGK))
    if normalize_qk:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    g = torch.zeros_like(beta_BTH) if log_decay is None else log_decay
    initial = q.new_zeros(q.shape[0], *q.shape[2:], v_BTHV.shape[3])
    return gated_delta_rule_recurrence(q * q.shape[-1] ** -0.5, k, v_BTHV.float(), g, beta_BTH, initial)[0].to(v_BTHV.dtype)


def repeat_heads(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors)


def sdpa(backend_name: str | None) -> Callable[..., Tensor]:
    """Torch's fused attention on one of its backends (None: on the one it chooses)."""

    def call(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        legal = list(SDPBackend.__members__.values())[1:] if backend_name is None else [getattr(SDPBackend, backend_name)]
        with sdpa_kernel(legal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def flex_attention(window: int | None) -> Callable[..., Tensor]:
    """FlexAttention with a causal (and windowed) block mask, compiled once; the mask is made once per length."""
    compiled: list[Any] = []
    block_masks: dict[int, Any] = {}

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) if window is None else (s <= t) & (s > t - window)

    def call(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not compiled:
            compiled.append(torch.compile(flex_attention))
        T = q_BTHK.shape[1]
        if T not in block_masks:
            block_masks[T] = create_block_mask(visible, None, None, T, T, device=q_BTHK.device.type)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        return compiled[0](q, k, v, block_mask=block_masks[T], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def flash_attn(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None = None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BTHK, k_BSGK, v_BSGV, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))


def xformers_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None = None) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightLocalAttentionMask, LowerTriangularMask

    bias = LowerTriangularMask() if window is None else LowerTriangularFromBottomRightLocalAttentionMask(window)
    k_BSHK, v_BSHV = repeat_heads(q_BTHK.shape[2], k_BSGK, v_BSGV)
    return memory_efficient_attention(q_BTHK, k_BSHK, v_BSHV, attn_bias=bias)


def fla_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, sinks_H: Tensor | None = None, cu_seqlens: Tensor | None = None, window: int | None = None
) -> Tensor:
    from fla.ops.attn import parallel_attn

    return parallel_attn(q_BTHK, k_BSGK, v_BSGV, window_size=window, sink_bias=sinks_H, cu_seqlens=cu_seqlens)


def dense_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
    """The plain formula with all its scores, as eager attention layers write it."""
    T = q_BTHK.shape[1]
    k_BSHK, v_BSHV = repeat_heads(q_BTHK.shape[2], k_BSGK, v_BSGV)
    s_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    s_BHTS = s_BHTS.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q_BTHK.device).triu(1), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", s_BHTS.softmax(-1, dtype=torch.float32).to(v_BSHV.dtype), v_BSHV)


def sdpa_decode(q_BHK: Tensor, k_cache: Tensor, v_cache: Tensor, lengths_B: Tensor) -> Tensor:
    """Torch's attention with a mask of the lengths, as a decode loop over a growing cache calls it."""
    mask_B11S = (torch.arange(k_cache.shape[1], device=q_BHK.device) < lengths_B[:, None])[:, None, None]
    k, v = (x.transpose(1, 2) for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q_BHK[:, :, None], k, v, attn_mask=mask_B11S, enable_gqa=True)[:, :, 0]


def flash_attn_decode(q_BHK: Tensor, k_cache: Tensor, v_cache: Tensor, lengths_B: Tensor) -> Tensor:
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q_BHK[:, None], k_cache, v_cache, cache_seqlens=lengths_B.int())[:, 0]


def torch_conv1d(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor, initial_tail: Tensor) -> Tensor:
    """Torch's depthwise convolution over the padded sequence."""
    x_BDL = torch.cat([initial_tail, x_BTD.transpose(1, 2)], dim=2)
    return F.silu(F.conv1d(x_BDL, weight_DW[:, None], bias_D, groups=weight_DW.shape[0])).transpose(1, 2)


def fla_conv1d(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor, initial_tail: Tensor) -> Tensor:
    """fla keeps W columns of the past, of which the first is never read."""
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x_BTD, weight_DW, bias_D, initial_state=F.pad(initial_tail, (1, 0)), activation="silu")[0]


def torch_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Torch's rms_norm and SiLU, one after the other."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(gate)


def fla_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(x, gate, weight, None, eps=1e-6)


def torch_grouped_mm(
    x_TD: Tensor, w_gate_up_EDF2: Tensor, w_down_EFD: Tensor, token_N: Tensor, weight_N: Tensor, expert_offsets: Tensor, **_: Tensor
) -> Tensor:
    """The experts by torch's grouped products between a gather and an index_add; padding rows would come back as garbage."""
    ends = expert_offsets[1:].int()
    gate_NF, up_NF = F.grouped_mm(x_TD[token_N], w_gate_up_EDF2, offs=ends).chunk(2, dim=-1)
    out_ND = F.grouped_mm(F.silu(gate_NF) * up_NF * weight_N[:, None].to(x_TD.dtype), w_down_EFD, offs=ends)
    return torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_N, out_ND.float()).to(x_TD.dtype)
