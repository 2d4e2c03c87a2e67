"""Copies of weights that a model in bf16 keeps for decoding: right for any width, and never of another weight than the
one that is there."""

import copy

import pytest
import torch
from torch import nn

from attention.config import AttentionConfig
from lm.config import ModelConfig
from lm.decode_step import STEPS
from lm.model import LanguageModel
from moe.config import MoEConfig
from triton_kernels.native import kept_weights
from triton_kernels.native.library import rounds_products

pytestmark = pytest.mark.skipif(not rounds_products(torch.bfloat16), reason="the processor multiplies no bf16")


def build(dtype, plan="L", **sizes):
    config = ModelConfig(
        vocab_size=50,
        n_layers=len(plan),
        layer_plan=plan,
        dtype=dtype,
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16),
        **{"d_model": 33, "moe": MoEConfig(n_experts=20, d_expert=7, d_shared=5)} | sizes,
    )
    model = LanguageModel(config).init_weights(0).eval()
    with torch.no_grad():
        model.head_VD.normal_(generator=torch.Generator().manual_seed(1))
    return model


@torch.no_grad()
def decode(model, cache, batch_size, n_tokens=2):
    tokens_BT = torch.randint(50, (batch_size, n_tokens), generator=torch.Generator().manual_seed(2))
    return torch.cat([model(token_B1, cache).logits_BTV for token_B1 in tokens_BT.split(1, dim=1)], dim=1)


def first_block(cache):
    return STEPS[cache].blocks[0]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("d_model", "d_expert"), [(32, 16), (33, 7), (90, 48), (1, 1)])
def test_steps_are_those_of_rounded_weights(d_model, d_expert, batch_size, steps):
    sizes = {"d_model": d_model, "moe": MoEConfig(n_experts=20, d_expert=d_expert, d_shared=5)}
    model, expected = build("bfloat16", **sizes), build("float32", **sizes)
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            if weight.dim() > 1 and "router" not in name and "embedding" not in name:
                weight.copy_(weight.bfloat16())
    cache = model.new_cache(batch_size, 2)
    logits_BTV = decode(model, cache, batch_size)
    block = first_block(cache)
    kept = (STEPS[cache].native.head, block.to_inner, block.to_out, block.gate_up, block.down, block.shared_gate_up)
    assert all(weight.panels for weight in (*kept, block.shared_down))
    expected_BTV = decode(expected, expected.new_cache(batch_size, 2), batch_size)
    assert len(steps) == 4
    # The logits alone are rounded.
    torch.testing.assert_close(logits_BTV.float(), expected_BTV, rtol=2**-8, atol=1e-4)


def other_parameter(model):
    model.head_VD = nn.Parameter(-model.head_VD)


CHANGES = {
    "a weight": lambda model: model.blocks[0].attention.to_inner.weight.mul_(2),
    "one number of it": lambda model: model.blocks[1].moe.experts.w_down_EFD[3, 2, 1].add_(5.0),
    "all weights": lambda model: model.load_state_dict({name: -x for name, x in model.state_dict().items()}),
    "fresh weights": lambda model: model.init_weights(3) and model.head_VD.normal_(),
    "a storage": lambda model: setattr(model.head_VD, "data", -model.head_VD),
    "a parameter": other_parameter,
    "an optimizer's step": lambda model: torch.optim.SGD([model.head_VD], foreach=True).step(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_by_the_cache_that_is_there(name, steps):
    model = build("bfloat16", "LF")
    cache = model.new_cache(2, 8)
    before_BTV = decode(model, cache, 2)
    model.head_VD.grad = torch.ones_like(model.head_VD)
    with torch.no_grad():
        CHANGES[name](model)
    # Nobody has kept anything of a copy's weights.
    fresh, fresh_cache = copy.deepcopy((model, cache))
    logits_BTV = decode(model, cache, 2)
    assert torch.equal(logits_BTV, decode(fresh, fresh_cache, 2))
    assert not torch.equal(logits_BTV, before_BTV)
    assert len(steps) == 6


def test_what_is_written_through_data_is_seen_by_the_next_cache(steps):
    model = build("bfloat16", "LF", d_model=256)
    decode(model, model.new_cache(2, 8), 2)
    model.blocks[1].attention.to_out.weight.data[17] = 1.0
    fresh = copy.deepcopy(model)
    assert torch.equal(decode(model, model.new_cache(2, 8), 2), decode(fresh, fresh.new_cache(2, 8), 2))
    assert len(steps) == 6


def test_caches_share_copies_that_live_as_long_as_a_weight():
    model = build("bfloat16")
    caches = [model.new_cache(1, 2) for _ in range(2)]
    for cache in caches:
        decode(model, cache, 1)
    assert first_block(caches[0]).gate_up.panels == first_block(caches[1]).gate_up.panels
    kept = len(kept_weights.KEPT)
    del model, caches, cache
    assert len(kept_weights.KEPT) < kept


def test_a_model_too_large_for_two_keeps_none(monkeypatch, steps):
    model = build("bfloat16")
    n_bytes = sum(weight.nbytes for weight in model.parameters())
    for memory, keeps in ((4 * n_bytes - 1, False), (4 * n_bytes, True)):
        monkeypatch.setattr(kept_weights, "memory_bytes", lambda memory=memory: memory)
        cache = model.new_cache(1, 2)
        decode(model, cache, 1)
        assert (first_block(cache).gate_up.panels is not None) == keeps
    assert len(steps) == 4
