import pytest
import torch

from lm.model import LanguageModel
from staged_training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
    restore_optimizer,
    trained_parameters,
    update,
)


@pytest.fixture
def model(model_config):
    return LanguageModel(model_config).init_weights(0)


def fill_gradients(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_decay_and_nothing_else(model):
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw", embedding_rate=1.0, weight_decay=0.3), 0)
    decay_of = {
        id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert len(decay_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.3 if parameter.dim() >= 2 and name != "embedding_VD" else 0.0
        assert decay_of[id(parameter)] == expected, name


@pytest.mark.parametrize("boundary", [0, 1, 3])
def test_only_what_is_above_the_boundary_moves(model, boundary):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw", embedding_rate=1.0), boundary)
    fill_gradients(optimizer, 0)
    update(optimizer, 1e-2)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, _ in trained_parameters(model, boundary)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert moved | frozen == set(before)
    assert not moved & frozen
    assert ("embedding_VD" in moved) == (boundary == 0)
    assert {"head_VD", "norm.weight"} <= moved
    assert any(name.startswith(f"blocks.{boundary}.") for name in moved)
    assert not any(name.startswith(f"blocks.{boundary - 1}.") for name in moved)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_embedding_moves_at_its_own_rate_and_the_rest_as_before(model_config, kind):
    moved = []
    for rate in (1.0, 5.0):
        model = LanguageModel(model_config).init_weights(0)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, embedding_rate=rate), 0)
        fill_gradients(optimizer, 0)
        update(optimizer, 1e-3)
        moved.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    one, five = moved
    torch.testing.assert_close(five.pop("embedding_VD"), 5 * one.pop("embedding_VD"), rtol=1e-3, atol=1e-6)
    for name, change in one.items():
        torch.testing.assert_close(five[name], change, rtol=0, atol=0, msg=name)


def test_clipping_returns_the_norm_it_found(model):
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw", embedding_rate=1.0), 2)
    fill_gradients(optimizer, 0)
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    expected = torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients))
    assert clip_gradients(optimizer, 0.5).item() == pytest.approx(expected.item(), rel=1e-5)
    after = torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients))
    assert after.item() == pytest.approx(0.5, rel=1e-4)


def test_a_restored_optimizer_goes_on_bit_for_bit(model_config):
    def train(model, optimizer, steps):
        for step in steps:
            fill_gradients(optimizer, step)
            update(optimizer, 1e-2 / (1 + step))

    straight = LanguageModel(model_config).init_weights(0)
    optimizer = build_optimizer(straight, OptimizerConfig(kind="adamw", embedding_rate=1.0), 1)
    train(straight, optimizer, range(3))
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(straight, optimizer, 1).items()}
    train(straight, optimizer, range(3, 6))

    resumed = LanguageModel(model_config).init_weights(9)
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, OptimizerConfig(kind="adamw", embedding_rate=1.0), 1)
    restore_optimizer(resumed, again, 1, stored)
    train(resumed, again, range(3, 6))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in straight.state_dict().items())


def test_states_of_another_model_are_refused_by_name(model):
    optimizer = build_optimizer(model, OptimizerConfig(kind="adamw", embedding_rate=1.0), 1)
    with pytest.raises(ValueError, match=r"exp_avg:blocks\.0\.moe"):
        restore_optimizer(model, optimizer, 1, {"exp_avg:blocks.0.moe.router.weight_ED": torch.zeros(4, 16)})
    with pytest.raises(ValueError, match=r"exp_avg:head_VD.*\[|exp_avg:head_VD.*\("):
        restore_optimizer(model, optimizer, 1, {"exp_avg:head_VD": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("name", "value"), [("betas", (0.9, 1.0)), ("eps", 0.0), ("weight_decay", -0.1), ("clip", 0.0)]
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**{name: value})
