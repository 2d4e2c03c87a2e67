"""The check that guards every benchmark: it passes right results, and names what is wrong about wrong ones."""

import dataclasses
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from foundation.tables import read_rows
from triton_kernels.tools.agreement import Agreement, Reference, results
from triton_kernels.tools.bench import (
    CEILING,
    DENSE,
    PEER_TOLERANCE,
    Ceilings,
    Timing,
    plot_roofline,
    run_bench,
    time_operation,
)
from triton_kernels.tools.gpu_check import run_gpu_check
from triton_kernels.tools.operations import Operation, operations, select_operations

OPERATION = operations()["decayed_linear_attention/token"]
SHAPE = {"B": 1, "T": 40, "H": 2, "K": 16, "V": 16}


def check(operation: Operation, shape: dict[str, int], dtype: torch.dtype, device: str, backend: str) -> Agreement:
    return Reference(operation, operation.inputs(dtype, device, **shape)).check(
        partial(operation.call, backend=backend)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_reference_agrees_with_itself_in_fp64(dtype: torch.dtype) -> None:
    assert check(OPERATION, SHAPE, dtype, "cpu", "torch").ok


def broken(factor: float):
    """The op with an output off by `factor` outside the torch reference."""

    def call(backend: str, **inputs):
        out, state = OPERATION.call(**inputs, backend="torch")
        return (out if backend == "torch" else factor * out), state

    return dataclasses.replace(OPERATION, call=call)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_output_is_found(factor: float) -> None:
    agreement = check(broken(factor), SHAPE, torch.float32, "cpu", "triton")
    assert not agreement.ok
    assert agreement.where


def test_integers_must_be_equal() -> None:
    def call(backend: str, **inputs):
        return OPERATION.call(**inputs, backend="torch")[0], torch.arange(3) + (backend == "triton")

    operation = dataclasses.replace(OPERATION, call=call)
    assert check(operation, SHAPE, torch.float32, "cpu", "torch").ok
    assert check(operation, SHAPE, torch.float32, "cpu", "triton").where == "output 1"


def test_infinities_and_booleans_must_be_equal_and_do_not_widen_the_budget() -> None:
    def check_second(right: list[float], found: list[float]) -> Agreement:
        def call(backend: str, **inputs):
            return OPERATION.call(**inputs, backend="torch")[0], torch.tensor(right if backend == "torch" else found)

        return check(dataclasses.replace(OPERATION, call=call), SHAPE, torch.float32, "cpu", "triton")

    assert check_second([-torch.inf, 1.0], [-torch.inf, 1.0]).ok
    assert check_second([True, False], [True, False]).ok
    for wrong in ([-torch.inf, 1.1], [-1e30, 1.0], [torch.inf, 1.0], [torch.nan, 1.0]):
        assert check_second([-torch.inf, 1.0], wrong).where.startswith("output 1")
    assert check_second([True, False], [True, True]).where == "output 1"


def test_an_op_that_updates_its_state_in_place_starts_from_the_same_state_each_time() -> None:
    def draw(dtype: torch.dtype, device: str, **shape: int):
        return {"state": torch.ones(4, dtype=dtype)}

    def call(backend: str, state: torch.Tensor):
        return state.mul_(0.5), state

    assert check(dataclasses.replace(OPERATION, call=call, inputs=draw), {}, torch.float32, "cpu", "torch").ok


def test_no_time_for_an_op_that_fails_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    unsteady = iter(range(1000))

    def call(backend: str, **inputs):
        out, state = OPERATION.call(**inputs, backend=backend)
        return out + next(unsteady), state

    rows = time_operation(
        dataclasses.replace(OPERATION, call=call),
        SHAPE,
        torch.float32,
        "cpu",
        Ceilings(flops=1e9, bandwidth=1e9),
        peers=False,
        repeats=1,
    )
    assert rows == []
    assert "no time, the check failed" in capsys.readouterr().out


def small(operation: Operation) -> Operation:
    return dataclasses.replace(operation, check_shapes=(SHAPE,), cpu_shapes=(SHAPE,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_on_a_cpu_the_torch_reference_is_timed_beside_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The table is looked at here, not the speeds.
    monkeypatch.setattr("triton_kernels.tools.bench.CEILING_SIZES", {"cpu": (64, 2**12)})
    monkeypatch.setattr("triton_kernels.tools.bench.SOURCE_SECONDS", 0.05)
    rows = run_bench(
        [small(OPERATION)],
        "cpu",
        (torch.float32, torch.bfloat16),
        peers=True,
        repeats=1,
        csv=tmp_path / "benchmark.csv",
    )
    ceilings = [(row.source, row.dtype) for row in rows if row.op == CEILING]
    assert ceilings == [("matmul", "float32"), ("copy", "float32"), ("matmul", "bfloat16"), ("copy", "bfloat16")]
    timed = [row for row in rows if row.op != CEILING]
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "backward", "forward+backward"):
            found = {row.source: row for row in timed if (row.dtype, row.direction) == (dtype, direction)}
            assert found.keys() == {"ours", "loop", DENSE}
            assert found["ours"].ratio == 1
            assert all(row.ms > 0 for row in found.values())
    assert read_rows(tmp_path / "benchmark.csv", Timing) == rows
    plot_roofline(rows, tmp_path / "roofline.svg")
    assert "TFLOP/s" in (tmp_path / "roofline.svg").read_text()


def test_a_slow_peer_has_few_turns_and_no_row_for_its_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.tools.bench.SLOW_MS", 50.0)
    monkeypatch.setattr("triton_kernels.tools.bench.SOURCE_SECONDS", 0.15)
    turns = []

    def slow(**inputs):
        turns.append(time.sleep(0.06))
        return OPERATION.call(**inputs, backend="torch")[0]

    operation = dataclasses.replace(small(OPERATION), cpu_peers={"slow": slow})
    rows = time_operation(
        operation, SHAPE, torch.float32, "cpu", Ceilings(flops=1e9, bandwidth=1e9), peers=True, repeats=20
    )
    assert {row.direction for row in rows if row.source == "slow"} == {"forward", "forward+backward"}
    assert {row.direction for row in rows if row.source == "ours"} == {"forward", "forward+backward", "backward"}
    # Checked once; for each of two directions one turn to warm up and at most three that count.
    assert 5 <= len(turns) <= 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_an_interrupted_benchmark_leaves_the_rows_it_has(tmp_path: Path) -> None:
    def interrupt(**inputs):
        raise KeyboardInterrupt

    operations = [small(OPERATION), dataclasses.replace(small(OPERATION), call=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        run_bench(operations, "cpu", (torch.float32,), peers=False, repeats=1, csv=tmp_path / "benchmark.csv")
    rows = read_rows(tmp_path / "benchmark.csv", Timing)
    assert {row.op for row in rows} == {CEILING, OPERATION.name}


def test_a_peer_that_breaks_or_disagrees_has_no_row_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(**inputs):
        raise RuntimeError("no such device")

    def disagrees(**inputs):
        return 1.1 * OPERATION.call(**inputs, backend="torch")[0]

    operation = dataclasses.replace(small(OPERATION), cpu_peers={"breaks": breaks, "disagrees": disagrees})
    rows = time_operation(
        operation, SHAPE, torch.float32, "cpu", Ceilings(flops=1e9, bandwidth=1e9), peers=True, repeats=1
    )
    assert {row.source for row in rows} == {"ours", DENSE}
    printed = capsys.readouterr().out
    assert "no row for breaks, RuntimeError: no such device" in printed
    assert "no row for disagrees, ArithmeticError" in printed


@pytest.mark.parametrize("name", sorted(name for name, operation in operations().items() if operation.cpu_peers))
def test_every_cpu_peer_computes_the_same_as_the_op(name: str) -> None:
    operation = operations()[name]
    few = {
        axis: min(size, {"T": 70, "S": 70, "D": 32}.get(axis, size)) for axis, size in operation.cpu_shapes[0].items()
    }
    inputs = operation.inputs(torch.float32, "cpu", **few)
    reference = Reference(operation, inputs)
    for peer, call in operation.cpu_peers.items():
        assert reference.judge(results(call, inputs)).worst < PEER_TOLERANCE, peer


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_gpu_check_refuses_a_machine_without_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CUDA"):
        run_gpu_check([OPERATION], tmp_path)


def test_operations_are_selected_by_op_or_variant_and_unknown_ones_refused() -> None:
    assert {operation.name for operation in select_operations(["decayed_linear_attention"])} == {
        "decayed_linear_attention/token",
        "decayed_linear_attention/fixed",
        "decayed_linear_attention/every_option",
    }
    assert select_operations(["decayed_linear_attention/fixed"])[0].name == "decayed_linear_attention/fixed"
    with pytest.raises(ValueError, match="decayed_attention is unknown"):
        select_operations(["decayed_attention"])
