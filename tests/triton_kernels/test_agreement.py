"""The check that guards every benchmark: it passes right results, and names what is wrong about wrong ones."""

import dataclasses

import pytest
import torch

from triton_kernels.agreement import check
from triton_kernels.bench import Ceilings, run_bench, time_operation
from triton_kernels.configurations import operations, select_operations
from triton_kernels.gpu_check import run_gpu_check

OPERATION = operations()["decayed_linear_attention/token"]
SHAPE = {"B": 1, "T": 40, "H": 2, "K": 16, "V": 16}


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


def test_no_time_for_an_op_that_fails_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    unsteady = iter(range(1000))

    def call(backend: str, **inputs):
        out, state = OPERATION.call(**inputs, backend=backend)
        return out + next(unsteady), state

    rows = time_operation(
        dataclasses.replace(OPERATION, call=call), SHAPE, torch.float32, "cpu", Ceilings(flops=1e9, bandwidth=1e9), peers=False, repeats=1
    )
    assert rows == []
    assert "no time, the check failed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_on_a_cpu_the_torch_reference_is_timed_and_gpu_check_refuses(tmp_path) -> None:
    small = dataclasses.replace(OPERATION, cpu_shape=SHAPE)
    rows = run_bench([small], peers=False, repeats=1, dtype=torch.float32)
    assert [(row.source, row.direction) for row in rows] == [("ours", "forward"), ("ours", "forward+backward")]
    assert all(row.ms > 0 and row.ratio == 1 for row in rows)
    with pytest.raises(ValueError, match="CUDA"):
        run_gpu_check([small], tmp_path)


def test_operations_are_selected_by_op_or_variant_and_unknown_ones_refused() -> None:
    assert {operation.name for operation in select_operations(["decayed_linear_attention"])} == {
        "decayed_linear_attention/token",
        "decayed_linear_attention/fixed",
    }
    assert select_operations(["decayed_linear_attention/fixed"])[0].name == "decayed_linear_attention/fixed"
    with pytest.raises(ValueError, match="decayed_attention is unknown"):
        select_operations(["decayed_attention"])
