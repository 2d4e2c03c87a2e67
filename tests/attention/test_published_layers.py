"""Latent attention, Mamba-2 and the gated short convolution against transformers' modules with the same weights: the
output of a whole text, and of a cached one, and gradients."""

import dataclasses
import itertools
import math

import pytest
import torch

from attention import AttentionConfig, build_attention
from attention.kinds import KINDS
from attention.mamba2 import mamba_widths
from attention.yarn import Yarn
from foundation.environment import version

pytestmark = pytest.mark.skipif(version("transformers") is None, reason="transformers is not installed")
D = 48


def fresh(module):
    """Random weights in fp32, norms near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return module.eval()


def ours(letter, config):
    return build_attention(letter, config, d_model=D, layer_index=0, n_layers=1)


def text(B=2, T=29):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def cached(layer, x_BTD, cuts):
    """The layer's output from a cache, in pieces."""
    state = KINDS[layer.kind.letter].new_state(
        layer.config, batch_size=len(x_BTD), max_length=x_BTD.shape[1], dtype=x_BTD.dtype, device=x_BTD.device
    )
    edges, pieces = [0, *cuts, x_BTD.shape[1]], []
    with torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            pieces.append(layer(x_BTD[:, begin:end], start=begin, state=state)[0])
    return torch.cat(pieces, dim=1)


def check(layer, published, tolerance=2e-6):
    """Relative to the output's scale, and to the gradient's."""
    x_BTD = text()
    ours_x, published_x = x_BTD.clone().requires_grad_(), x_BTD.clone().requires_grad_()
    expected_BTD = published(published_x)
    actual_BTD = layer(ours_x)[0]
    scale = expected_BTD.abs().max().item()
    torch.testing.assert_close(actual_BTD, expected_BTD, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(
        cached(layer, x_BTD, [11, 12, 20, *range(21, 29)]), expected_BTD, rtol=0, atol=tolerance * scale
    )
    (expected_gradient,) = torch.autograd.grad(expected_BTD.square().sum(), published_x)
    (gradient,) = torch.autograd.grad(actual_BTD.square().sum(), ours_x)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=0, atol=3 * tolerance * expected_gradient.abs().max().item()
    )


def rotary_first(weight, heads, plain, rotary, interleaved=True):
    """Rows of [heads * (plain + rotary)] with each head's rotary channels first, and those that turn together half a
    head apart instead of side by side."""
    rows = torch.arange(heads * (plain + rotary)).view(heads, plain + rotary)
    turned = rows[:, plain:]
    if interleaved:
        turned = torch.cat([turned[:, 0::2], turned[:, 1::2]], dim=1)
    return weight[torch.cat([turned, rows[:, :plain]], dim=1).flatten()]


YARN = {
    **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 8},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
}


@pytest.mark.parametrize("query_dim", [None, 20])
@pytest.mark.parametrize(
    ("positions", "yarn"), [(True, None), (False, None), (True, YARN), (True, {**YARN, "mscale_all_dim": 0.7})]
)
def test_latent_attention_is_deepseeks(query_dim, positions, yarn):
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    H, K, R, V, C = 3, 12, 8, 14, 24
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=query_dim,
        kv_lora_rank=C,
        qk_nope_head_dim=K,
        qk_rope_head_dim=R,
        v_head_dim=V,
        **({} if yarn is None else {"rope_parameters": yarn}),
        attn_implementation="eager",
    )
    published = fresh(DeepseekV3Attention(config, layer_idx=0))
    options = {}
    if yarn is not None:
        whole, rotary = (0.1 * yarn[name] * math.log(yarn["factor"]) + 1 for name in ("mscale_all_dim", "mscale"))
        stretched = Yarn(factor=40.0, original_length=8, magnitude=rotary / whole)
        options = {"latent_scale": whole**2, "yarn": stretched}
    layer = ours(
        "A",
        AttentionConfig(
            n_heads=H,
            n_kv_heads=1,
            head_dim=K,
            latent_dim=C,
            latent_shared_dim=R,
            latent_value_dim=V,
            latent_query_dim=query_dim,
            rotary_fraction=float(positions),
            norm_eps=1e-6,
            **options,
        ),
    )
    with torch.no_grad():
        queries = published.q_proj if query_dim is None else published.q_b_proj
        queries = rotary_first(queries.weight, H, K, R)
        latents = rotary_first(published.kv_a_proj_with_mqa.weight, 1, C, R)
        latents = torch.cat([latents[R:], latents[:R]])
        if query_dim is None:
            layer.to_inner.weight.copy_(torch.cat([queries, latents]))
        else:
            layer.to_inner.weight.copy_(torch.cat([published.q_a_proj.weight, latents]))
            layer.q_norm.weight.copy_(published.q_a_layernorm.weight)
            layer.to_query.weight.copy_(queries)
        layer.kv_norm.weight.copy_(published.kv_a_layernorm.weight)
        by_head = published.kv_b_proj.weight.view(H, K + V, C)
        layer.to_heads.weight.copy_(torch.cat([by_head[:, :K].flatten(0, 1), by_head[:, K:].flatten(0, 1)]))
        layer.to_out.weight.copy_(published.o_proj.weight)

    def run(x_BTD):
        T = x_BTD.shape[1]
        cos, sin = DeepseekV3RotaryEmbedding(config)(x_BTD, torch.arange(T)[None])
        if not positions:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        return published(x_BTD, (cos, sin), mask)[0]

    check(layer, run)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_2_is_mamba_2s(groups):
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = AttentionConfig(
        linear_heads=4, linear_key_dim=10, linear_value_dim=24, mamba_groups=groups, chunk_size=8, norm_eps=1e-6
    )
    H, K, V = config.linear_shape
    published = fresh(
        Mamba2Mixer(
            Mamba2Config(
                hidden_size=D,
                num_heads=H,
                head_dim=V,
                state_size=K,
                n_groups=groups,
                expand=2,
                conv_kernel=4,
                chunk_size=8,
                layer_norm_epsilon=1e-6,
                use_bias=False,
            ),
            layer_idx=0,
        )
    )
    layer = ours("D", config)
    with torch.no_grad():
        gate, conv, step = published.in_proj.weight.split([H * V, sum(mamba_widths(config)), H])
        # Published: x, B, C. Here: query, key, value, which are C, B, x.
        order = torch.arange(len(conv)).split([H * V, groups * K, groups * K])
        order = torch.cat(order[::-1])
        layer.to_inner.weight.copy_(torch.cat([conv[order], gate, step]))
        layer.conv_XW.copy_(published.conv1d.weight[order, 0])
        layer.conv_bias_X.copy_(published.conv1d.bias[order])
        layer.decay_gate.A_log_H.copy_(published.A_log)
        layer.decay_gate.dt_bias.copy_(published.dt_bias)
        layer.skip_H.copy_(published.D)
        layer.norm_X.copy_(published.norm.weight)
        layer.to_out.weight.copy_(published.out_proj.weight)
    check(layer, published)


@pytest.mark.parametrize("taps", [3, 7])
def test_the_short_convolution_is_lfm2s(taps):
    from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    published = fresh(
        Lfm2ShortConv(Lfm2Config(hidden_size=D, conv_L_cache=taps, num_hidden_layers=1, layer_types=["conv"]), 0)
    )
    layer = ours("C", dataclasses.replace(AttentionConfig(), short_conv_dim=D, conv_width=taps))
    with torch.no_grad():
        layer.to_inner.weight.copy_(published.in_proj.weight)
        layer.conv_XW.copy_(published.conv.weight[:, 0])
        layer.to_out.weight.copy_(published.out_proj.weight)
    check(layer, published)
