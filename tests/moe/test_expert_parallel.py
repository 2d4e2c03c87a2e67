"""Experts spread over 2 and 4 gloo processes: outputs and all gradients are those of one process, for ragged
assignments."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import forking

WORKER = Path(__file__).with_name("expert_parallel_worker.py")
_spec = importlib.util.spec_from_file_location("expert_parallel_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 6e-2, "rtol": 3e-2},
}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def processes(request, tmp_path_factory):
    """What each process left, by rank."""
    folder, n = tmp_path_factory.mktemp("processes"), request.param
    root = Path(__file__).parents[2]
    with forking():
        started = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder), str(rank), str(n)],
                env={"PYTHONPATH": str(root)},
                stderr=subprocess.PIPE,
            )
            for rank in range(n)
        ]
    errors = [process.communicate(timeout=120)[1].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(n)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", worker.CASES)
def test_outputs_and_gradients_are_those_of_one_process(processes, case, dtype):
    alone = worker.experts(torch.float32 if dtype == torch.bfloat16 else dtype)
    dw_gate_up, dw_down = torch.zeros_like(alone.w_gate_up_EDF2), torch.zeros_like(alone.w_down_EFD)
    rows_E = torch.zeros(worker.E, dtype=torch.int64)
    for rank, left in enumerate(processes):
        x_TD, assignments, dy_TD = worker.problem(case, rank, dtype)
        rows_E += assignments.rows_per_expert_E()
        y_TD = alone(x_TD, assignments)
        inputs = (x_TD, assignments.weight_N, alone.w_gate_up_EDF2, alone.w_down_EFD)
        dx_TD, dweight_N, dw_gate_up_rank, dw_down_rank = torch.autograd.grad(y_TD, inputs, dy_TD)
        dw_gate_up, dw_down = dw_gate_up + dw_gate_up_rank / len(processes), dw_down + dw_down_rank / len(processes)
        for got, expected in zip(left["results"][case, str(dtype)], (y_TD, dx_TD, dweight_N)):
            torch.testing.assert_close(got, expected.detach(), **TOLERANCE[dtype])
        if case == "ragged":
            assert (assignments.experts_per_token_T() == 0).any()
            assert assignments.experts_per_token_T().max() == worker.K
    for left in processes:
        for got, expected in zip(left["results"][case, str(dtype)][3:], (dw_gate_up, dw_down)):
            torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    # The cases are what their names say.
    per_process = rows_E.unflatten(0, (len(processes), -1)).sum(dim=1)
    assert {
        "ragged": bool((per_process > 0).all()),
        "all rows to the first process": bool((per_process[1:] == 0).all() and per_process[0] > 0),
        "no rows to the first process": bool(per_process[0] == 0 and per_process[-1] > 0),
        "no rows at all": bool((per_process == 0).all()),
    }[case]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_layer_with_null_experts_and_a_shared_expert_trains_alike(processes, backend):
    alone = worker.layer(backend).train()
    for rank, left in enumerate(processes):
        x_TD = torch.randn(worker.T, worker.D, generator=torch.Generator().manual_seed(rank))
        before = {name: parameter.grad for name, parameter in alone.named_parameters()}
        alone.zero_grad()
        y_TD, routing = alone(x_TD)
        (y_TD.square().sum() + sum(routing.losses.values())).backward()
        got_y_TD, got = left["results"]["layer", backend]
        torch.testing.assert_close(got_y_TD, y_TD.detach(), atol=1e-5, rtol=1e-5)
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            if name.startswith("experts."):
                # Every process's tokens reach the experts: their gradient is the mean over all.
                parameter.grad = parameter.grad / len(processes) + (0 if before[name] is None else before[name])
            else:
                torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-4)
    for name, parameter in alone.experts.named_parameters():
        torch.testing.assert_close(
            processes[0]["results"]["layer", backend][1][f"experts.{name}"], parameter.grad, atol=1e-4, rtol=1e-4
        )


def test_what_cannot_be_divided_is_refused(processes):
    for left in processes:
        uneven, two_dimensional = left["refusals"]
        assert f"n_experts = 9 cannot be divided evenly over {len(processes)} processes" in uneven
        assert "one dimension of a mesh, this one has 2: ('data', 'expert')" in two_dimensional
