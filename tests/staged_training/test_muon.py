"""Muon on packed parameters against a loop over their matrices with torch's own Muon."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attention.config import AttentionConfig
from attention.kinds import KINDS
from lm.model import LanguageModel
from staged_training import muon
from staged_training.flops import optimizer_flops
from staged_training.optimizer import OptimizerConfig, build_optimizer, optimizer_tensors, restore_optimizer, update
from staged_training.packed_matrices import packed_matrices
from triton_kernels.native.library import native

CONFIG = OptimizerConfig(kind="muon", embedding_rate=1.0, weight_decay=0.3)


@pytest.fixture
def every_kind(model_config):
    """A model with each kind of attention, a shared expert, an output gate and heads of several widths."""
    attention = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, window=4, output_gate=True, linear_value_dim=12)
    moe = dataclasses.replace(model_config.moe, d_shared=24)
    return dataclasses.replace(
        model_config, n_layers=len(KINDS), layer_plan="FSRrLGKMADC", attention=attention, moe=moe, d_model=32
    )


@pytest.fixture
def in_fp32(monkeypatch):
    """torch's Muon computes in bfloat16 whatever it is given; this makes it compute in fp32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def by_a_loop(model, names, config, steps, rate):
    """The parameters of `names` after `steps` of torch.optim.Muon on each of their matrices, [out, in] and one by
    one."""
    packings, after = packed_matrices(model, routers=config.muon_routers), {}
    for name in names:
        parameter, packing = model.get_parameter(name), packings[name]

        def matrices(tensor, packing=packing):
            flat = [matrix for stack in packing.split(tensor) for matrix in stack]
            return [matrix if packing.out_dim == -2 else matrix.T for matrix in flat]

        weights = [torch.nn.Parameter(matrix.clone()) for matrix in matrices(parameter.detach())]
        optimizer = torch.optim.Muon(
            weights, lr=rate, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn=config.muon_scale
        )
        for step in steps:
            fill_gradients(model, step)
            for weight, gradient in zip(weights, matrices(parameter.grad)):
                weight.grad = gradient.clone()
            optimizer.step()
        after[name] = weights, matrices
    return after


# Every two of their values meet.
@pytest.mark.parametrize(
    ("at_once", "routers", "scale"),
    [
        *((1, False, "match_rms_adamw"), (1, True, "original")),
        *((10_000, True, "match_rms_adamw"), (10_000, False, "original")),
        *((muon.AT_ONCE, False, "match_rms_adamw"), (muon.AT_ONCE, True, "original")),
    ],
)
@pytest.mark.usefixtures("in_fp32")
def test_every_matrix_by_itself_as_torchs_muon_has_it(every_kind, monkeypatch, scale, routers, at_once):
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    config = dataclasses.replace(CONFIG, muon_scale=scale, muon_routers=routers)
    model = LanguageModel(every_kind).init_weights(0)
    optimizer = build_optimizer(model, config, 0)
    names = list(packed_matrices(model, routers=routers))
    expected = by_a_loop(model, names, config, range(3), 1e-2)
    for step in range(3):
        fill_gradients(model, step)
        update(optimizer, 1e-2)
    for name, (weights, matrices) in expected.items():
        got = matrices(model.get_parameter(name).detach())
        for one, other in zip(weights, got, strict=True):
            torch.testing.assert_close(other, one.detach(), atol=2e-5, rtol=1e-4, msg=name)
    assert set(optimizer.state[model.get_parameter(names[0])]) == {"momentum_buffer"}


def test_in_bfloat16_as_torchs_muon_up_to_its_rounding(every_kind):
    model = LanguageModel(dataclasses.replace(every_kind, dtype="bfloat16")).init_weights(0)
    optimizer = build_optimizer(model, CONFIG, 0)
    names = ["blocks.0.moe.experts.w_gate_up_EDF2", "blocks.5.attention.to_inner.weight"]
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    expected = by_a_loop(model, names, CONFIG, [0], 1e-2)
    fill_gradients(model, 0)
    update(optimizer, 1e-2)
    for name, (weights, matrices) in expected.items():
        moved = torch.stack([m.square().mean() for m in matrices(model.get_parameter(name).detach() - before[name])])
        apart = [
            (a.detach() - b).square().mean() for a, b in zip(weights, matrices(model.get_parameter(name).detach()))
        ]
        assert max(apart) < 1e-2 * moved.min()


@pytest.mark.parametrize("boundary", [0, 3])
def test_its_flops_are_what_torch_counts(every_kind, boundary, monkeypatch):
    # torch counts its own products only.
    monkeypatch.setattr(muon, "takes_many_rows", lambda x: False)
    model = LanguageModel(every_kind).init_weights(0)
    optimizer = build_optimizer(model, CONFIG, boundary)
    fill_gradients(model, 0)
    with FlopCounterMode(display=False) as counter:
        update(optimizer, 1e-2)
    assert counter.get_total_flops() == optimizer_flops(every_kind, CONFIG, boundary) > 0
    assert optimizer_flops(every_kind, OptimizerConfig(kind="adamw")) == 0


def test_which_parameters_are_matrices(every_kind):
    """Each kind of parameter has its place: a new one fails here, and whoever adds it says where it belongs."""
    model = LanguageModel(every_kind)
    packings = packed_matrices(model, routers=False)
    for name, packing in packings.items():
        assert sum(packing.widths) == model.get_parameter(name).shape[packing.out_dim], name
        assert min(packing.widths) > 0, name
    adamw = {name.split(".")[-1] for name, p in model.named_parameters() if p.dim() >= 2 and name not in packings}
    assert adamw == {"embedding_VD", "head_VD", "weight_ED", "conv_XW"}
    widths = [packings[f"blocks.{layer}.attention.to_inner.weight"].widths for layer in range(len(KINDS))]
    full, linear = (32, 32, 16, 16), (32, 32, 48)
    assert widths[:5] == [full, full, (32, 32), (32, 32), (*linear, 48)]
    assert widths[5:7] == [(*linear, 48, 4, 4), (*linear, 12, 8, 4)]
    assert len(widths[7]) == 8
    assert widths[8:] == [(4 * 12, 32, 4), (8, 8, 48, 48, 4), (32, 32, 32)]


@pytest.mark.skipif(native().library is None, reason=native().reason)
@pytest.mark.parametrize("shape", [(5, 32, 128), (2, 33, 33), (3, 1, 7), (1, 16, 41)])
def test_in_c_as_in_torch_whatever_the_strides(shape):
    N, R, C = shape
    x = torch.randn(N, C, R + 3, generator=torch.Generator().manual_seed(0))
    x[0, :, 1] = 0
    expected_NRC = muon.orthogonalised(x.mT[:, :R].double(), torch.float64)
    views = (x.clone().mT[:, :R], x.mT.contiguous()[:, :R], x.mT[:, :R].contiguous())
    # Of another shape, and larger.
    other = torch.randn(2, R + 5, C + 7, generator=torch.Generator().manual_seed(1))
    other_expected = muon.orthogonalised(other.double(), torch.float64)
    muon.orthogonalise_native([*((view, 2.0) for view in views), (other, 3.0)])
    for view in views:
        torch.testing.assert_close(view.double(), 2.0 * expected_NRC, atol=1e-4, rtol=0)
    torch.testing.assert_close(other.double(), 3.0 * other_expected, atol=1e-4, rtol=0)


def test_singular_values_come_out_near_one_and_nothing_stays_nothing():
    generator = torch.Generator().manual_seed(0)
    x_NRC = torch.randn(3, 16, 40, generator=generator)
    x_NRC[1] = 0
    result_NRC = muon.orthogonalised(x_NRC, torch.float32)
    values = torch.linalg.svdvals(result_NRC[[0, 2]])
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert not result_NRC[1].any()


@pytest.mark.parametrize("boundary", [0, 2])
def test_a_restored_muon_goes_on_bit_for_bit(model_config, boundary):
    def train(model, optimizer, steps):
        for step in steps:
            fill_gradients(model, step)
            update(optimizer, 1e-2 / (1 + step))

    straight = LanguageModel(model_config).init_weights(0)
    optimizer = build_optimizer(straight, CONFIG, boundary)
    train(straight, optimizer, range(3))
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(straight, optimizer, boundary).items()}
    train(straight, optimizer, range(3, 6))

    resumed = LanguageModel(model_config).init_weights(9)
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, CONFIG, boundary)
    restore_optimizer(resumed, again, boundary, stored)
    train(resumed, again, range(3, 6))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in straight.state_dict().items())
    below = [name for name in weights if name.startswith("blocks.0.")]
    assert below
    assert all(
        torch.equal(weights[name], straight.state_dict()[name]) == (boundary > 0) for name in below if "w_" in name
    )


@pytest.mark.parametrize(("stored", "asked"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(model_config, stored, asked):
    model = LanguageModel(model_config).init_weights(0)
    optimizer = build_optimizer(model, OptimizerConfig(kind=stored), 0)
    fill_gradients(model, 0)
    update(optimizer, 1e-2)
    tensors = optimizer_tensors(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"'(exp_avg|step|momentum_buffer):blocks.*another optimizer"):
        restore_optimizer(model, build_optimizer(model, OptimizerConfig(kind=asked), 0), 0, tensors)


@pytest.mark.parametrize(("name", "value"), [("kind", "sgd"), ("muon_scale", "none"), ("muon_momentum", 1.0)])
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**{name: value})
