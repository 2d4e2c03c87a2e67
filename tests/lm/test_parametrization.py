"""CompleteP: at the base's sizes nothing changes; at others one table says what every tensor's first weights, rate,
decay and epsilon are multiplied by; and what the model computes then moves as much at any width and depth.

Legend: B batch, T tokens, D model width.
"""

import dataclasses
import math

import pytest
import torch

from attention.config import AttentionConfig
from lm.config import ModelConfig, Parametrization
from lm.model import LanguageModel
from lm.options import ModelOptions
from lm.parametrization import ratios_of, tensor_rules
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.optimizer import OptimizerConfig, build_optimizer, clip_gradients, update

BASE = ModelOptions(
    n_layers=2,
    d_model=32,
    layer_plan="SF",
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    window=8,
    n_experts=8,
    d_expert=8,
    d_shared=16,
    k=2,
    dtype="float32",
    base_n_layers=2,
    base_d_model=32,
    base_d_expert=8,
    base_k=2,
)
VOCABULARY = 96


def config_of(width=1, depth=1, expert=None, k=1, *, on=True):
    """The base, `width` times as wide and so on; experts grow with the width unless told."""
    options = dataclasses.replace(
        BASE,
        n_layers=2 * depth,
        d_model=32 * width,
        n_heads=4 * width,
        n_kv_heads=2 * width,
        d_expert=8 * (expert or width),
        d_shared=16 * width,
        k=2 * k,
        parametrization="complete_p" if on else "standard",
    )
    return options.config(VOCABULARY)


def trained(config, kind, *, rate=0.02, steps=3):
    """How far a few steps move logits and the last residual stream from where they were: root mean squares, and that of
    the stream before."""
    model = LanguageModel(config).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, embedding_rate=1.0), 0)
    tokens_BT = torch.randint(0, VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(1))

    def seen():
        with torch.no_grad():
            stream_BTD = model.prefix(tokens_BT[:, :-1], config.n_layers)
            return stream_BTD, model(tokens_BT[:, :-1]).logits_BTV

    before = seen()
    for step in range(steps):
        model.begin_step(step, 0)
        output = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
        (output.loss + output.routing_loss).backward()
        clip_gradients(optimizer, 1.0)
        update(optimizer, rate)
        model.after_step()
    moved = [float((after - first).square().mean().sqrt()) for first, after in zip(before, seen())]
    return (*moved, float(before[0].square().mean().sqrt()))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_at_the_bases_sizes_nothing_changes(kind):
    states = []
    for on in (False, True):
        config = config_of(on=on)
        model = LanguageModel(config).init_weights(3)
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind), 0)
        tokens_BT = torch.arange(66).view(2, 33) % VOCABULARY
        for _ in range(2):
            model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:]).loss.backward()
            update(optimizer, 0.01)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_tensor_has_the_rule_of_its_kind():
    # Three times as wide, twice as deep, experts five times as wide, twice as many of them for a token.
    config = config_of(3, 2, 5, 2)
    assert ratios_of(config, 0) == {"w": 3.0, "l": 2.0, "f": 5.0, "k": 2.0}
    rules = tensor_rules(LanguageModel(config))
    expected = {
        "embedding_VD": (1, 1, 1 / 3),
        "head_VD": (1, 1 / 3, 1),
        "norm.weight": (1, 1, 1 / 3),
        "blocks.3.attention_norm.weight": (1, 1, 1 / 6),
        "blocks.1.attention.q_norm.weight": (1, 1, 1 / 6),
        "blocks.0.attention.to_inner.weight": (1, 1 / 3, 1 / 6),
        "blocks.3.attention.to_out.weight": (2**0.5, 1 / 3, 1 / 6),
        "blocks.2.moe.router.weight_ED": (1, 1 / 3, 1 / 2),
        "blocks.2.moe.experts.w_gate_up_EDF2": (1, 1 / 3, 1 / 20),
        "blocks.2.moe.experts.w_down_EFD": (2, 1 / 5, 1 / 12),
        "blocks.2.moe.shared_expert.w_gate_up_DF2": (1, 1 / 3, 1 / 6),
        "blocks.2.moe.shared_expert.w_down_FD": (2**0.5, 1 / 3, 1 / 6),
    }
    for name, numbers in expected.items():
        rule = rules[name]
        assert (rule.init, rule.rate, rule.eps) == pytest.approx(numbers), name


@pytest.mark.parametrize("letter", list("LGKADCM"))
def test_every_kind_of_attention_has_rules(letter):
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16)
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    base = Parametrization(base_d_model=32, base_n_layers=1, base_d_expert=8, base_k=2)
    config = ModelConfig(
        vocab_size=64, d_model=64, n_layers=2, layer_plan=letter, attention=attention, moe=moe, parametrization=base
    )
    model = LanguageModel(config)
    rules = tensor_rules(model)
    assert rules.keys() == dict(model.named_parameters()).keys()
    assert rules["blocks.1.attention.to_out.weight"].rate == 0.5


@pytest.mark.parametrize(("scale", "expected"), [("match_rms_adamw", 3**-0.5), ("original", 1.0)])
def test_muons_rate_keeps_the_spectral_norm_of_an_update(scale, expected):
    model = LanguageModel(config_of(3, 2))
    optimizer = build_optimizer(model, OptimizerConfig(kind="muon", muon_scale=scale), 0)
    of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    for end in ("attention.to_inner.weight", "attention.to_out.weight", "moe.experts.w_gate_up_EDF2"):
        group = of[named[f"blocks.0.{end}"]]
        assert group["rate"] == pytest.approx(expected), end
        assert group["rate"] * group["weight_decay"] == pytest.approx(0.1)
    # Beside Muon it is AdamW's.
    assert of[named["head_VD"]]["rate"] == pytest.approx(1 / 3)
    assert of[named["blocks.0.moe.router.weight_ED"]]["eps"] == pytest.approx(1e-8 / 2)
    assert of[named["embedding_VD"]]["rate"] == 70.0


def test_first_weights_keep_the_size_of_what_a_layer_computes():
    def added(config):
        """Of one block's experts and attention, before they are divided by the depth."""
        block = LanguageModel(config).init_weights(0).blocks[0]
        x_TD = torch.randn(256, config.d_model, generator=torch.Generator().manual_seed(0))
        mixed_TD, _ = block.moe.experts(x_TD, block.moe.router(x_TD).assignments), None
        attended, _ = block.attention(x_TD[None], start=0, state=None, shared=None)
        return torch.tensor([float(mixed_TD.square().mean().sqrt()), float(attended.square().mean().sqrt())])

    with torch.no_grad():
        base = added(config_of())
        for config in (config_of(4), config_of(1, 4), config_of(1, 1, 4), config_of(1, 1, 1, 3)):
            assert added(config) / base == pytest.approx([1.0, 1.0], rel=0.2)
        # Without, three times as many experts for a token are a smaller sum.
        assert float((added(config_of(1, 1, 1, 3, on=False)) / base)[0]) == pytest.approx(3**-0.5, rel=0.2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("axis", ["width", "depth"])
def test_a_few_steps_move_activations_as_far_at_any_size(kind, axis):
    def growth(*, on):
        small, large = (trained(config_of(**{axis: times}, on=on), kind) for times in (1, 4))
        return [after / before for before, after in zip(small, large)]

    with_it, without = growth(on=True), growth(on=False)
    # Stream, logits, and the stream before any step. (That of depth shrinks a little: deep models begin as smaller
    # perturbations of the embedding.)
    assert all(0.55 < each < 1.5 for each in with_it), (with_it, without)
    assert max(without) > 1.4 * max(1.0, *with_it), (with_it, without)


def test_models_that_the_rules_do_not_hold_for_are_refused():
    config = config_of(2)
    with pytest.raises(ValueError, match="a tied head has the embedding's rate and its own"):
        dataclasses.replace(config, tied_embeddings=True)
    with pytest.raises(ValueError, match="norm 'sandwich' in block 0; legal: pre"):
        dataclasses.replace(config, norm="sandwich")
    router = dataclasses.replace(config.moe.router, renormalise=False)
    with pytest.raises(ValueError, match=r"sum to no fixed number; legal: RouterConfig\.renormalise True"):
        dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))
    with pytest.raises(ValueError, match="base_d_model"):
        Parametrization(base_d_model=0, base_n_layers=1, base_d_expert=1, base_k=1)
    model = LanguageModel(config)
    model.odd = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"no rule for odd of shape \(2, 2\)"):
        tensor_rules(model)
    assert math.isclose(model.blocks[0].residual.experts_added, 1.0)
    assert LanguageModel(config_of(1, 2)).blocks[0].residual.attention_added == 0.5
