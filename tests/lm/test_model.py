"""The model: cut anywhere it computes the same, it decodes as it trains, and its initial weights depend on the seed and
the layer alone."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.config import AttentionConfig
from foundation.serialize import from_dict, to_dict
from lm.accounting import decode_bytes, kv_bytes, mixing_flops
from lm.config import NORM_PLACES, BlockOverride, ModelConfig
from lm.model import IGNORED_TARGET, LanguageModel, token_losses
from moe.config import MoEConfig
from routing.policies.top_k import TopK

TINY = ModelConfig(
    vocab_size=61,
    d_model=32,
    n_layers=4,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=5, chunk_size=4),
    moe=MoEConfig(n_experts=16, d_expert=16),
)
PLANS = ["F", "S", "L", "G", "FR", "Sr", "SSSFSSSR", "LLLF", "GGGF", "SLGF"]


def tiny(plan: str = "F", **changes) -> ModelConfig:
    return dataclasses.replace(TINY, layer_plan=plan, n_layers=max(4, len(plan)), **changes)


def awake(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose zero-initialised head has been replaced, so that logits depend on everything below."""
    model = LanguageModel(config).init_weights(seed)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_decoding_one_token_at_a_time_equals_the_full_forward(plan):
    model = awake(tiny(plan))
    tokens_BT = tokens(2, 19)
    full_BTV = model(tokens_BT).logits_BTV
    cache = model.new_cache(2, 19)
    parts = [model(tokens_BT[:, :7], cache).logits_BTV, model(tokens_BT[:, 7:10], cache).logits_BTV]
    parts += [model(tokens_BT[:, t : t + 1], cache).logits_BTV for t in range(10, 19)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full_BTV, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("boundary", [1, 2, 4])
@torch.no_grad()
def test_suffix_of_prefix_is_the_model(boundary):
    model = awake(tiny("SLGF"))
    tokens_BT = tokens(2, 11)
    output = model.run(model.prefix(tokens_BT, boundary), boundary)
    assert torch.equal(output.logits_BTV, model(tokens_BT).logits_BTV)
    assert len(output.routings) == 4 - boundary


@pytest.mark.parametrize("plan", ["F", "SLGF"])
@torch.no_grad()
def test_the_future_does_not_leak(plan):
    model = awake(tiny(plan))
    tokens_BT = tokens(1, 24)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 13:] = (changed_BT[:, 13:] + 1) % TINY.vocab_size
    before, after = model(tokens_BT).logits_BTV, model(changed_BT).logits_BTV
    # Other tokens share the experts' matrix products, whose blocking may change the last bit; nothing beyond that may
    # differ.
    torch.testing.assert_close(before[:, :13], after[:, :13], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 13:], after[:, 13:], atol=1e-2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), layer=st.integers(0, 3))
def test_a_layers_initial_weights_depend_on_seed_and_layer_only(seed, layer):
    one = LanguageModel(tiny("F")).init_weights(seed)
    other = LanguageModel(tiny("SSSF")).init_weights(seed + 1)
    other.init_weights(seed, layers=[layer])
    for index in range(4):
        same = torch.equal(one.blocks[index].moe.experts.w_down_EFD, other.blocks[index].moe.experts.w_down_EFD)
        assert same == (index == layer)
    assert not torch.equal(one.embedding_VD, other.embedding_VD)


@pytest.mark.parametrize("plan", PLANS)
def test_every_parameter_learns(plan):
    model = awake(tiny(plan)).train()
    model.begin_step(0, 0)
    tokens_BT = tokens(4, 33)
    output = model(tokens_BT[:, :-1])
    (token_losses(output.logits_BTV, tokens_BT[:, 1:]).mean() + output.routing_loss).backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert not silent


def test_bf16_stays_close_to_fp32():
    exact, rounded = awake(tiny("SLGF")), awake(tiny("SLGF", dtype="bfloat16"))
    tokens_BT = tokens(2, 20)
    with torch.no_grad():
        losses = [
            token_losses(model(tokens_BT[:, :-1]).logits_BTV, tokens_BT[:, 1:]).mean() for model in (exact, rounded)
        ]
    assert rounded(tokens_BT).logits_BTV.dtype == torch.bfloat16
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_ignored_targets_cost_nothing():
    logits_BTV = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    losses_BT = token_losses(logits_BTV, torch.tensor([[2, IGNORED_TARGET, 4]]))
    assert losses_BT[0, 1] == 0
    torch.testing.assert_close(losses_BT[0, 0], -logits_BTV[0, 0].log_softmax(-1)[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype: 'float16'"),
        ({"n_layers": 0}, "n_layers: 0"),
        ({"layer_plan": "SXF"}, "'X'"),
        ({"layer_plan": "RF"}, "'R'"),
    ],
)
def test_bad_configs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_tokens_must_be_a_batch():
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\]"):
        LanguageModel(TINY)(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("norm", NORM_PLACES)
def test_norms_stand_where_the_configuration_says(norm):
    """Against the formulas, written out."""
    model = awake(dataclasses.replace(tiny("F"), norm=norm))
    block, x_BTD = model.blocks[0], torch.randn(2, 5, model.config.d_model, generator=torch.Generator().manual_seed(1))

    def placed(f, before, behind, x_BTD):
        inner_BTD = before(x_BTD)
        within = {
            "pre": f(inner_BTD),
            "post": behind(f(x_BTD)),
            "sandwich": behind(f(inner_BTD)),
            "stream": f(inner_BTD),
        }
        return (inner_BTD if norm == "stream" else x_BTD) + within[norm]

    def attention(x_BTD):
        return block.attention(x_BTD)[0]

    def experts(x_BTD):
        return block.moe(x_BTD.flatten(0, 1))[0].view_as(x_BTD)

    attended_BTD = placed(attention, block.attention_norm, block.attention_out_norm, x_BTD)
    expected_BTD = placed(experts, block.moe_norm, block.moe_out_norm, attended_BTD)
    out_BTD, *_ = block(x_BTD, start=0, state=None, shared=None)
    torch.testing.assert_close(out_BTD, expected_BTD)
    assert ("attention_norm.weight" in block.state_dict()) == (norm != "post")
    assert ("attention_out_norm.weight" in block.state_dict()) == (norm in ("post", "sandwich"))


def test_blocks_may_differ_in_everything_but_the_model_width():
    base = tiny("SF")
    narrow = dataclasses.replace(base.attention, n_heads=2, n_kv_heads=1, window=3, rotary_fraction=0.0)
    small = dataclasses.replace(base.moe, n_experts=4, router=dataclasses.replace(base.moe.router, policy=TopK(k=1)))
    blocks = [base.block(layer) for layer in range(base.n_layers)]
    blocks[0] = dataclasses.replace(blocks[0], attention=narrow, norm="sandwich")
    blocks[1] = dataclasses.replace(blocks[1], moe=small)
    config = base.with_blocks(blocks)
    assert [config.block(layer) for layer in range(config.n_layers)] == blocks
    assert from_dict(ModelConfig, to_dict(config)) == config
    output = awake(config)(tokens(2, 7))
    assert [routing.assignments.n_experts for routing in output.routings[:2]] == [base.moe.n_experts, 4]
    # What equals the model's own is not stored twice: the way back gives the very same configuration.
    assert config.with_blocks([base.block(layer) for layer in range(base.n_layers)]).blocks == ()


@torch.no_grad()
def test_blocks_with_attention_of_their_own_decode_as_they_run():
    base = tiny("SFRG")
    narrow = dataclasses.replace(base.attention, window=3, rotary_fraction=0.0, linear_heads=1)
    wide = dataclasses.replace(base.attention, n_heads=4, n_kv_heads=2, head_dim=8, rope_base=500.0)
    own = [narrow, wide, dataclasses.replace(wide, n_heads=2, output_gate=True), narrow]
    config = dataclasses.replace(base, blocks=tuple(BlockOverride(attention=attention) for attention in own))
    assert config.attentions == tuple(own)
    model, tokens_BT = awake(config), tokens(2, 13)
    cache = model.new_cache(2, 13)
    parts = [model(tokens_BT[:, :6], cache).logits_BTV]
    parts += [model(tokens_BT[:, t : t + 1], cache).logits_BTV for t in range(6, 13)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT).logits_BTV, atol=2e-4, rtol=2e-4)
    assert cache.nbytes() == 2 * kv_bytes(config, 13)
    # A window of 3, all 100 tokens once for two layers, and a state that does not grow.
    assert kv_bytes(config, 100) - kv_bytes(config, 3) == 97 * 2 * (2 * 8) * 4
    assert decode_bytes(config, 100, 3) - decode_bytes(config, 3, 3) == 2 * 97 * 2 * (2 * 8) * 4
    assert [mixing_flops(config, layer, 100) / mixing_flops(base, layer, 100) for layer in (1, 2)] == [1, 0.5]


def test_the_frozen_part_has_names():
    model = awake(tiny("SF"))
    frozen = model.frozen_names(1)
    assert model.frozen_names(0) == frozenset()
    assert "embedding_VD" in frozen
    assert frozen - {"embedding_VD"} == {name for name in model.state_dict() if name.startswith("blocks.0.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "peri"}, "ModelConfig.norm: 'peri' is not supported; did you mean 'pre'"),
        ({"blocks": (BlockOverride(),)}, "ModelConfig.blocks: 1 for 4 blocks; legal: one each"),
        (
            {
                "layer_plan": "FR",
                "blocks": (
                    BlockOverride(),
                    BlockOverride(attention=AttentionConfig(n_heads=2, n_kv_heads=2, head_dim=16)),
                )
                * 2,
            },
            r"layer 1 \(R\) reads the keys and values of layer 0 \(F\), but n_kv_heads is 2, not 1; legal: the same",
        ),
        (
            {"layer_plan": "FM", "attention": AttentionConfig(n_heads=1, n_kv_heads=1)},
            "mixed_linear_heads: 0 of n_heads=1; legal: at least one head of either kind",
        ),
        ({"blocks": (BlockOverride(norm="x"),) * 4}, r"ModelConfig.blocks\[0\].norm: 'x' is not supported"),
    ],
)
def test_refuses_wrong_blocks(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny("F"), **change)


def test_ids_outside_the_vocabulary_are_named():
    model = LanguageModel(ModelConfig(vocab_size=10, d_model=16, n_layers=1)).init_weights(0)
    for ids in ([[1, 10]], [[-1, 3]]):
        with pytest.raises(ValueError, match=r"tokens: ids from -?\d+ to \d+, must lie in the vocabulary \[0, 10\)"):
            model(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"targets: ids from 3 to 12, must lie in the vocabulary \[0, 10\)"):
        token_losses(torch.zeros(1, 2, 10), torch.tensor([[3, 12]]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_asked_for_its_loss_gives_the_mean_of_its_token_losses(dtype):
    model, tokens_BT = awake(tiny(dtype=dtype)), tokens(2, 9)
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:].clone()
    targets_BT[0, 2] = IGNORED_TARGET
    output = model(inputs_BT, targets_BT=targets_BT)
    # Logits that are asked for are rounded to the model's dtype, those within the loss need not be.
    rounding = {"rtol": 2**-8, "atol": 0.0} if dtype == "bfloat16" else {}
    torch.testing.assert_close(output.loss, token_losses(model(inputs_BT).logits_BTV, targets_BT).mean(), **rounding)
    assert output.logits_BTV.numel() == 0
    targets_BT[1, 3] = TINY.vocab_size
    with pytest.raises(ValueError, match=r"targets: ids from -100 to 61, must lie in the vocabulary"):
        model(inputs_BT, targets_BT=targets_BT)
    with pytest.raises(ValueError, match="targets: shape"):
        model(inputs_BT, targets_BT=tokens_BT)
