"""The same ops through other libraries and as plain formulas: what `bench --peers` times and `inspect --peer` compiles
beside ours.

Each takes the tensors its op's `Operation.inputs` draws and returns the op's first output; a library is imported when
it is called, so that one that is not installed costs nothing but its row. None of them is a dependency.

Legend: B batch, T queries, S keys, H query (or value) heads, G key/value (or query/key) heads, K key width, V value
width, D channels, W width.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.linear.linear_attention_torch import linear_attention_recurrence


def imported(path: str) -> Any:
    """`path` is "module.name"."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def repeat_heads(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors)


def fla_simple_gla(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    gate = {"g_gamma" if log_decay.dim() == 1 else "g": log_decay}
    return imported("fla.ops.simple_gla.chunk_simple_gla")(q_BTHK, k_BTHK, v_BTHV, scale=scale, **gate)[0]


def transformers_lightning(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """The attention of transformers' MiniMax layer alone: its projections, norm and output gate are replaced by what
    passes its input through."""
    heads, width = q_BTHK.shape[2:]
    config = imported("transformers.MiniMaxConfig")(hidden_size=width, num_attention_heads=heads, head_dim=width)
    layer = imported("transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention")(config, layer_idx=0)
    layer.act_fn = layer.qkv_proj = layer.norm = layer.out_proj = torch.nn.Identity()
    # Its sigmoid is 1 at 40.
    del layer.output_gate
    layer.output_gate = lambda x: x.new_full((), 40.0)
    layer.slope_rate = -log_decay[:, None, None].to(q_BTHK.dtype)
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    packed = torch.cat((q_BTHK * scale, k_BTHK, v_BTHV), -1).flatten(2)
    return layer(packed, None, None)[0].view_as(v_BTHV)


def loop_linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """The recurrence, token by token in fp32."""
    return loop_rule(scale * q_BTHK.float(), k_BTHK, v_BTHV, log_decay.expand(q_BTHK.shape[:3]))


def loop_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta_BTH: Tensor | None = None
) -> Tensor:
    initial_BHKV = log_decay.new_zeros(q_BTHK.shape[0], *q_BTHK.shape[2:], v_BTHV.shape[3])
    return linear_attention_recurrence(
        q_BTHK.float(), k_BTHK.float(), v_BTHV.float(), log_decay, beta_BTH, initial_BHKV
    )[0].to(v_BTHV.dtype)


def fla_delta(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, normalize_qk: bool
) -> Tensor:
    """Plain, gated or Kimi delta attention, by the axes of the decay."""
    names = {0: "delta_rule.chunk_delta_rule", 3: "gated_delta_rule.chunk_gated_delta_rule", 4: "kda.chunk_kda"}
    gate = {} if log_decay is None else {"g": log_decay}
    chunked = imported(f"fla.ops.{names[0 if log_decay is None else log_decay.dim()]}")
    return chunked(q_BTGK, k_BTGK, v_BTHV, beta=beta_BTH, use_qk_l2norm_in_kernel=normalize_qk, **gate)[0]


def transformers_delta(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor, beta_BTH: Tensor, normalize_qk: bool
) -> Tensor:
    """The torch implementations of Qwen3-Next (gated) and Kimi Linear (a decay per channel), which repeat shared heads
    beforehand."""
    gated, kimi = (
        "qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule",
        "kimi_linear.modeling_kimi_linear.chunk_kimi_delta_attention",
    )
    chunked = imported(f"transformers.models.{gated if log_decay.dim() == 3 else kimi}")
    return chunked(
        *repeat_heads(v_BTHV.shape[2], q_BTGK, k_BTGK),
        v_BTHV,
        log_decay,
        beta_BTH,
        use_qk_l2norm_in_kernel=normalize_qk,
    )[0]


def loop_delta(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, log_decay: Tensor | None, beta_BTH: Tensor, normalize_qk: bool
) -> Tensor:
    """The recurrence, token by token in fp32."""
    q, k = (x.float() for x in repeat_heads(v_BTHV.shape[2], q_BTGK, k_BTGK))
    if normalize_qk:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    return loop_rule(
        q * q.shape[-1] ** -0.5, k, v_BTHV, torch.zeros_like(beta_BTH) if log_decay is None else log_decay, beta_BTH
    )


def sdpa(backend_name: str | None) -> Callable[..., Tensor]:
    """Torch's fused attention on one of its backends (None: on the one it chooses)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    legal = (
        list(SDPBackend.__members__.values())[1:] if backend_name is None else [SDPBackend.__members__[backend_name]]
    )

    def call(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        with sdpa_kernel(legal):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)

    return call


def flex_attention(window: int | None) -> Callable[..., Tensor]:
    """FlexAttention with a causal (and windowed) block mask, compiled once; the mask is made once per length."""

    @cache
    def block_mask(length: int, device: str) -> Any:
        def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return (s <= t) if window is None else (s <= t) & (s > t - window)

        return imported("torch.nn.attention.flex_attention.create_block_mask")(
            visible, None, None, length, length, device=device
        )

    @cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(imported("torch.nn.attention.flex_attention.flex_attention"))

    def call(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
        mask = block_mask(q.shape[2], q.device.type)
        return compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return call


def flash_attn(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None = None) -> Tensor:
    visible = (-1, -1) if window is None else (window - 1, 0)
    return imported("flash_attn.flash_attn_func")(q_BTHK, k_BSGK, v_BSGV, causal=True, window_size=visible)


def xformers_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, window: int | None = None) -> Tensor:
    masks: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    bias = (
        masks.LowerTriangularMask()
        if window is None
        else masks.LowerTriangularFromBottomRightLocalAttentionMask(window)
    )
    repeated = repeat_heads(q_BTHK.shape[2], k_BSGK, v_BSGV)
    return imported("xformers.ops.memory_efficient_attention")(q_BTHK, *repeated, attn_bias=bias)


def fla_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    sinks_H: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    return imported("fla.ops.attn.parallel_attn")(
        q_BTHK, k_BSGK, v_BSGV, window_size=window, sink_bias=sinks_H, cu_seqlens=cu_seqlens
    )


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
    return imported("flash_attn.flash_attn_with_kvcache")(
        q_BHK[:, None], k_cache, v_cache, cache_seqlens=lengths_B.int()
    )[:, 0]


def torch_conv1d(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor, initial_tail: Tensor) -> Tensor:
    """Torch's depthwise convolution over the padded sequence."""
    x_BDL = torch.cat([initial_tail, x_BTD.transpose(1, 2)], dim=2)
    return F.silu(F.conv1d(x_BDL, weight_DW[:, None], bias_D, groups=weight_DW.shape[0])).transpose(1, 2)


def fla_conv1d(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor, initial_tail: Tensor) -> Tensor:
    """fla keeps W columns of the past, of which the first is never read."""
    padded = F.pad(initial_tail, (1, 0))
    return imported("fla.modules.causal_conv1d.causal_conv1d")(
        x_BTD, weight_DW, bias_D, initial_state=padded, activation="silu"
    )[0]


def torch_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Torch's rms_norm and SiLU, one after the other."""
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6) * F.silu(gate)


def fla_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return imported("fla.modules.norm.fused_norm_gate.rms_norm_gated")(x, gate, weight, None, eps=1e-6)


def torch_grouped_mm(
    x_TD: Tensor,
    w_gate_up_EDF2: Tensor,
    w_down_EFD: Tensor,
    token_N: Tensor,
    weight_N: Tensor,
    expert_offsets: Tensor,
    **_: Tensor,
) -> Tensor:
    """The experts by torch's grouped products between a gather and an index_add; padding rows would come back as
    garbage."""
    ends = expert_offsets[1:].int()
    gate_NF, up_NF = F.grouped_mm(x_TD[token_N], w_gate_up_EDF2, offs=ends).chunk(2, dim=-1)
    out_ND = F.grouped_mm(F.silu(gate_NF) * up_NF * weight_N[:, None].to(x_TD.dtype), w_down_EFD, offs=ends)
    return torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_N, out_ND.float()).to(x_TD.dtype)
