"""RouterTrace records what was dispatched, and leaves no trace of itself."""

import contextlib

import pytest
import torch
from torch import nn

from routing.policies.top_p import TopP
from routing.router import Router, RouterConfig
from routing.trace import RouterTrace, read_trace

E, D = 12, 8


def routers() -> nn.ModuleList:
    config = RouterConfig(policy=TopP(target_mean=3.0, floor=0, cap=6))
    built = [Router(config, d_model=D, n_experts=E, layer_index=layer) for layer in (0, 3)]
    for router in built:
        router.init_weights(torch.Generator().manual_seed(router.layer_index))
    return nn.ModuleList(built).eval()


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(seed))


def test_every_dispatched_row_of_every_forward_is_read_back(tmp_path):
    model, seen = routers(), []
    with RouterTrace(model, tmp_path / "trace", rows_per_file=50):
        for forward in range(3):
            for router in model:
                rows = router(inputs(forward)).assignments
                seen += [
                    (router.layer_index, forward, *row)
                    for row in zip(rows.token_N.tolist(), rows.expert_N.tolist(), rows.weight_N.tolist())
                ]
    assert len(list((tmp_path / "trace").iterdir())) > 1
    read = read_trace(tmp_path / "trace")
    assert (
        list(zip(*(getattr(read, name).tolist() for name in ("layer", "forward", "token", "expert", "weight")))) == seen
    )


def test_outside_the_block_nothing_is_left_and_results_have_the_same_bits(tmp_path):
    model = routers()
    before = {name: (set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}
    plain = model[0](inputs(0)).assignments
    with RouterTrace(model, tmp_path):
        traced = model[0](inputs(0)).assignments
    with contextlib.suppress(RuntimeError), RouterTrace(model, tmp_path / "second"):
        model[0](inputs(0))
        raise RuntimeError("inside")
    after = model[0](inputs(0)).assignments
    assert before == {name: (set(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}
    for other in (traced, after):
        assert all(
            torch.equal(getattr(plain, name), getattr(other, name))
            for name in ("token_N", "expert_N", "weight_N", "expert_offsets")
        )
    assert len(read_trace(tmp_path / "second").token) == len(plain.token_N), "what ran before an error is kept"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="Linear holds no router"):
        RouterTrace(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="holds no trace"):
        read_trace(tmp_path)
    with RouterTrace(routers()[0], tmp_path) as trace:
        trace.routers[0](inputs(0))
    with pytest.raises(ValueError, match="holds a trace already"):
        RouterTrace(routers(), tmp_path)
