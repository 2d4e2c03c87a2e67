"""A head that is the embedding: one matrix in the file, in the optimizer, in the accounts, and in a fork."""

import dataclasses

import pytest
import safetensors.torch
import torch

from attention.config import AttentionConfig
from lm.accounting import decode_bytes, model_cost
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import WEIGHTS_FILE, load_pretrained, save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.optimizer import OptimizerConfig, build_optimizer, optimizer_tensors, restore_optimizer, update

V, D = 50, 32


def config(**more):
    router = RouterConfig(policy=TopK(k=2))
    return ModelConfig(
        vocab_size=V,
        d_model=D,
        n_layers=2,
        layer_plan="FS",
        attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=16, window=8),
        moe=MoEConfig(n_experts=4, d_expert=16, router=router),
        **{"tied_embeddings": True, "embedding_scale": D**0.5, **more},
    )


def train(model, optimizer, steps, boundary=0):
    """Losses of a text that repeats itself."""
    tokens_BT = torch.arange(40).repeat(2, 1) % 7
    losses = []
    for step in range(steps):
        model.begin_step(step, 0)
        inputs = tokens_BT[:, :-1]
        output = model.run(model.prefix(inputs, boundary) if boundary else inputs, boundary, tokens_BT[:, 1:])
        (output.loss + output.routing_loss).backward()
        losses.append(output.loss.item())
        update(optimizer, 3e-3)
        model.after_step(boundary)
    return losses


def test_it_is_stored_once_and_trains_as_one(tmp_path):
    model = LanguageModel(config()).init_weights(0)
    names = [name for name, _ in model.named_parameters()]
    assert "embedding_VD" in names
    assert "head_VD" not in names
    assert model.head is model.embedding_VD
    before = model.embedding_VD.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(), 0)
    losses = train(model.train(), optimizer, 25)
    assert losses[-1] < 0.7 * losses[0]
    # Rows of tokens that never occur move as well: the head pushes them away.
    assert (model.embedding_VD[7:] != before[7:]).all()
    save_pretrained(tmp_path / "model", model.eval())
    assert "head_VD" not in safetensors.torch.load_file(tmp_path / "model" / WEIGHTS_FILE)
    back = load_pretrained(tmp_path / "model")
    tokens_BT = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(back(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_it_takes_adamw_with_the_decay_of_a_matrix_and_the_rate_of_all(kind):
    model = LanguageModel(config()).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, weight_decay=0.3, embedding_rate=10.0), 0)
    (group,) = [group for group in optimizer.param_groups if any(p is model.embedding_VD for p in group["params"])]
    assert (group["weight_decay"], group["rate"]) == (0.3, 1.0)
    train(model.train(), optimizer, 2)
    state = optimizer_tensors(model, optimizer, 0)
    assert {"exp_avg:embedding_VD", "exp_avg_sq:embedding_VD"} <= state.keys()
    assert not any("head_VD" in name for name in state)
    again = LanguageModel(model.config)
    restore_optimizer(again, build_optimizer(again, OptimizerConfig(kind=kind), 0), 0, state)
    untied = LanguageModel(config(tied_embeddings=False)).init_weights(0)
    optimizer = build_optimizer(untied, OptimizerConfig(kind=kind, weight_decay=0.3, embedding_rate=10.0), 0)
    (group,) = [group for group in optimizer.param_groups if any(p is untied.embedding_VD for p in group["params"])]
    assert (group["weight_decay"], group["rate"]) == (0.0, 10.0)


def test_a_frozen_embedding_freezes_the_head():
    model = LanguageModel(config()).init_weights(0)
    before = model.embedding_VD.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(), 1)
    assert not model.head.requires_grad
    losses = train(model.train(), optimizer, 5, boundary=1)
    assert losses[-1] < losses[0]
    assert torch.equal(model.embedding_VD, before)


def test_it_is_counted_once():
    tied, untied = (model_cost(config(tied_embeddings=t), length=8, mean_experts=2) for t in (True, False))
    assert tied.total_parameters == untied.total_parameters - V * D
    assert tied.total_parameters == sum(p.numel() for p in LanguageModel(config()).parameters())
    # What a token passes is the same.
    assert tied.active_parameters == untied.active_parameters
    assert tied.forward_flops == untied.forward_flops
    assert decode_bytes(config(), 8, 2) == decode_bytes(config(tied_embeddings=False), 8, 2)
    assert tied.prefix_share(1) > untied.prefix_share(1)


def test_a_step_in_one_call_knows_it_and_leaves_scales_to_the_layers():
    tokens_BT = torch.randint(V, (2, 10), generator=torch.Generator().manual_seed(0))
    for more in ({"embedding_scale": 1.0}, {}, {"logit_scale": 0.5}):
        model = LanguageModel(config(**more)).init_weights(0).eval()
        cache = model.new_cache(2, 10)
        with torch.no_grad():
            parts = [model(token_B1, cache).logits_BTV for token_B1 in tokens_BT.split(1, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens_BT).logits_BTV, atol=1e-4, rtol=1e-4)


def test_tied_and_untied_cannot_share_a_trunk():
    from staged_training.boundary import choose_cut

    method = dataclasses.replace(config(), tied_embeddings=False)
    with pytest.raises(ValueError, match="tied_embeddings is False instead of True"):
        choose_cut(config(), {"untied": method}, 0.5)
