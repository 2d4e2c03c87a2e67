"""Options that published models need: the same by every path, and combinations that make no sense are refused by
name."""

import dataclasses

import pytest
import torch

from attention.config import AttentionConfig
from attention.yarn import Yarn
from lm.accounting import model_cost
from lm.config import ModelConfig, Residual
from lm.model import LanguageModel
from moe.config import ClampedSwiGLU, MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from triton_kernels.native import library

ATTENTION = {
    "qk_norm_whole": True,
    "unit_offset": True,
    "qkv_bias": True,
    "out_bias": True,
    "yarn": Yarn(factor=4.0, original_length=32),
    "softmax_scale": 0.4,
    "head_gate": True,
}
MOE = {"shared_gate": True, "expert_bias": True, "clamped": ClampedSwiGLU(limit=1.0), "gated": False, "d_latent": 12}
ROUTER = {"bias": True, "scaling": 2.5, "renormalise_eps": 0.2}


def build(plan="FSRr", attention=None, moe=None, router=None, **model):
    router = RouterConfig(policy=TopK(k=2), **(router or {}))
    config = ModelConfig(
        vocab_size=50,
        d_model=32,
        n_layers=4,
        layer_plan=plan,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, window=5, **(attention or {})),
        moe=MoEConfig(n_experts=6, d_expert=16, d_shared=8, router=router, **(moe or {})),
        **model,
    )
    return LanguageModel(config).init_weights(0).eval()


def moved(model):
    """The model with every parameter away from what it starts from: options that begin as zero take part."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def decoded(model):
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        pieces = (tokens_BT[:, :4], *tokens_BT[:, 4:].split(1, dim=1))
        return torch.cat([model(piece_BT, cache).logits_BTV for piece_BT in pieces], dim=1), model(tokens_BT).logits_BTV


CASES = {
    **{name: {"attention": {name: value}} for name, value in ATTENTION.items()},
    **{name: {"moe": {name: value}} for name, value in MOE.items()},
    **{f"router {name}": {"router": {name: value}} for name, value in ROUTER.items()},
    "unit_offset of the model": {"unit_offset": True},
    "linear_key_heads": {"plan": "GGGF", "attention": {"linear_key_heads": 2}},
    "decay_bound": {"plan": "GKGF", "attention": {"decay_bound": 5.0}},
    "negative_eigenvalues": {"plan": "GKGF", "attention": {"negative_eigenvalues": True}},
    "mamba_step_floor": {"plan": "DDDF", "attention": {"mamba_step_floor": 0.5, "mamba_groups": 2}},
    "tied_embeddings": {"tied_embeddings": True},
    "embedding_scale": {"embedding_scale": 5.0},
    "logit_scale": {"logit_scale": 0.3},
    "residual": {"residual": Residual(attention_kept=1.2, attention_added=0.4, experts_added=0.7)},
}
# What changes the number of products.
OTHER_PRODUCTS = ("linear_key_heads", "head_gate", "gated", "d_latent", "mamba_step_floor")


@pytest.mark.parametrize("case", CASES)
def test_an_option_is_the_same_by_every_path(case, monkeypatch):
    model = moved(build(**CASES[case]))
    fast, whole = decoded(model)
    torch.testing.assert_close(fast, whole, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(library, "native", lambda: library.Compiled(None, "switched off"))
    for by_torch in decoded(model):
        torch.testing.assert_close(fast, by_torch, atol=1e-4, rtol=1e-4)
    plain = moved(build(plan=CASES[case].get("plan", "FSRr")))
    assert plain.config != model.config
    # Weights that begin a unit lower and move as far are the same norm.
    same = torch.allclose(decoded(plain)[1], decoded(model)[1], atol=1e-5)
    assert same == ("unit_offset" in case)


@pytest.mark.parametrize("case", CASES)
def test_an_option_trains_and_costs_what_it_should(case):
    model = build(**CASES[case]).train()
    model.begin_step(0, 0)
    tokens_BT = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    output = moved(model)(tokens_BT, targets_BT=tokens_BT)
    (output.loss + output.routing_loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # Vectors are no products, whatever shape they lie in.
    cost = model_cost(model.config, length=12, mean_experts=2)
    plain = model_cost(build(plan=CASES[case].get("plan", "FSRr")).config, length=12, mean_experts=2)
    if case not in OTHER_PRODUCTS:
        assert cost.forward_flops == plain.forward_flops


@pytest.mark.parametrize("option", ["qk_norm_whole", "unit_offset"])
def test_options_of_the_norm_of_queries_need_it(option):
    with pytest.raises(ValueError, match=f"AttentionConfig.{option}: True without qk_norm"):
        AttentionConfig(qk_norm=False, **{option: True})


@pytest.mark.parametrize("option", ATTENTION)
def test_a_mixed_layer_refuses_what_it_does_not_have(option):
    with pytest.raises(ValueError, match=rf"AttentionConfig.{option}: .*legal in a mixed layer \(M\)"):
        ModelConfig(layer_plan="M", attention=AttentionConfig(**{option: ATTENTION[option]}))


def test_a_layer_that_shares_keys_stretches_as_their_owner_does():
    config = build("FR").config
    blocks = [config.block(layer) for layer in range(4)]
    stretched = dataclasses.replace(config.attention, yarn=ATTENTION["yarn"])
    blocks[1] = dataclasses.replace(blocks[1], attention=stretched)
    with pytest.raises(ValueError, match=r"layer 1 \(R\) reads .* but yarn is"):
        config.with_blocks(blocks)


def test_heads_of_keys_have_to_fit():
    with pytest.raises(ValueError, match="linear_key_heads: 3; legal: a divisor of the 4 linear heads"):
        AttentionConfig(linear_key_heads=3)
    with pytest.raises(ValueError, match="linear_key_heads: 2; legal in a layer of kind K"):
        ModelConfig(layer_plan="K", attention=AttentionConfig(linear_key_heads=2))


def test_experts_refuse_by_name():
    with pytest.raises(ValueError, match=r"MoEConfig\.shared_gate"):
        MoEConfig(shared_gate=True)
    with pytest.raises(ValueError, match=r"MoEConfig\.backend: 'triton' knows neither"):
        MoEConfig(expert_bias=True, backend="triton")
    with pytest.raises(ValueError, match=r"ClampedSwiGLU\.limit: 0"):
        ClampedSwiGLU(limit=0)


def test_yarn_refuses_by_name():
    with pytest.raises(ValueError, match=r"Yarn\.factor: 0\.5"):
        Yarn(factor=0.5, original_length=10)
    with pytest.raises(ValueError, match=r"Yarn\.slow_turns: 40"):
        Yarn(factor=2.0, original_length=10, slow_turns=40.0)


def test_options_of_models_refuse_by_name():
    with pytest.raises(ValueError, match=r"ModelConfig\.logit_scale: 0\.0; legal: above 0"):
        ModelConfig(logit_scale=0.0)
    with pytest.raises(ValueError, match=r"Residual\.experts_kept: -1\.0; legal: above 0"):
        Residual(experts_kept=-1.0)
    with pytest.raises(ValueError, match=r"AttentionConfig\.softmax_scale: 0\.0; legal: above 0"):
        AttentionConfig(softmax_scale=0.0)
    with pytest.raises(ValueError, match=r"MoEConfig\.gated: False with clamped"):
        MoEConfig(gated=False, clamped=ClampedSwiGLU())
    with pytest.raises(ValueError, match=r"MoEConfig\.d_expert: 0 of 80 experts"):
        MoEConfig(d_expert=0)


def test_a_block_without_experts_is_attention_alone():
    none = MoEConfig(n_experts=1, d_expert=0, router=RouterConfig(policy=TopK(k=1)))
    config = build("FSGD").config
    config = config.with_blocks(
        [dataclasses.replace(config.block(layer), moe=none if layer % 2 else config.moe) for layer in range(4)]
    )
    model = moved(LanguageModel(config).init_weights(0).eval())
    fast, whole = decoded(model)
    torch.testing.assert_close(fast, whole, atol=1e-4, rtol=1e-4)
    block = model.blocks[1]
    assert not any("moe_norm" in name for name, _ in block.named_parameters())
    x_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y_BTD, _, routing, _ = block(x_BTD, start=0, state=None, shared=None)
        alone_BTD, _ = block.attention(block.attention_norm(x_BTD))
    torch.testing.assert_close(y_BTD, x_BTD + alone_BTD)
    assert routing.statistics.mean_experts == 1.0
    # Its router, which has nothing to choose from, is all that it has beside attention and its norm.
    costs = model_cost(config, length=12, mean_experts=2).layers
    attention = sum(p.numel() for p in block.attention.parameters()) + block.attention_norm.weight.numel()
    assert costs[1].total_parameters == attention + 32


def test_a_norm_of_the_stream_and_weights_of_both_parts():
    """The formula of `BlockConfig`, written out."""
    residual = Residual(attention_kept=1.5, attention_added=0.5, experts_kept=0.7, experts_added=2.0)
    block = moved(build("FFFF", norm="stream", residual=residual)).blocks[0]
    x_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y_BTD, *_ = block(x_BTD, start=0, state=None, shared=None)
        inner_BTD = block.attention_norm(x_BTD)
        x_BTD = 1.5 * inner_BTD + 0.5 * block.attention(inner_BTD)[0]
        inner_BTD = block.moe_norm(x_BTD)
        mixed_TD, _ = block.moe(inner_BTD.flatten(0, 1))
    torch.testing.assert_close(y_BTD, 0.7 * inner_BTD + 2.0 * mixed_TD.view_as(x_BTD))
