"""gpu-check runs to its end: the whole flow on the interpreter, at shapes of a few tokens, with everything but the
parts that only CUDA has."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.tables import read_rows
from triton_kernels.common.launch_tables import every_option, launch_table
from triton_kernels.tools.bench import CEILING, Timing
from triton_kernels.tools.gpu_check import run_gpu_check
from triton_kernels.tools.operations import Operation, all_options, operations

TINY = {"B": 1, "T": 20, "H": 2, "K": 16, "V": 16}


def tiny(name: str, *shapes: dict[str, int]) -> Operation:
    return dataclasses.replace(operations()[name], check_shapes=shapes, cpu_shapes=shapes[:1])


def correctness(folder: Path) -> list[dict[str, str]]:
    header, *lines = (folder / "correctness.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","))) for line in lines]


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_kernels.tools.gpu_check.plot_roofline", lambda rows, path: None)


def test_the_whole_flow_on_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decayed = tiny("decayed_linear_attention/token", TINY, TINY | {"K": 80})
    norm = tiny("gated_rms_norm", {"B": 1, "T": 5, "H": 2, "D": 24})
    assert run_gpu_check([norm, decayed], tmp_path, device="cpu"), capsys.readouterr().out
    lines = correctness(tmp_path)
    assert {line["ok"] for line in lines} == {"True"}
    aspects = {(line["op"], line["dtype"], line["aspect"]) for line in lines}
    for op in (norm.name, decayed.name):
        assert {(op, "float16", "option 0"), (op, "float32", "option 0"), (op, "float16", "torch.compile")} <= aspects
    timings = read_rows(tmp_path / "benchmark.csv", Timing)
    assert {row.op for row in timings} == {CEILING, norm.name, decayed.name}
    assert "forward+backward" in {row.direction for row in timings}
    assert (tmp_path / "roofline.svg").exists()


@pytest.mark.long
def test_every_op_passes_in_one_run(
    tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them in one process, as on a GPU: what one leaves behind (the compiler's variants, for one) must not be
    the next one's failure."""
    monkeypatch.setattr("triton_kernels.tools.gpu_check.DTYPES", {"cpu": (torch.float16,)})
    monkeypatch.setattr("triton_kernels.tools.bench.CEILING_SIZES", {"cpu": (64, 2**12)})
    monkeypatch.setattr("triton_kernels.tools.bench.SOURCE_SECONDS", 0.05)
    largest = {
        "B": 2,
        "T": 33,
        "S": 48,
        "H": 4,
        "G": 2,
        "J": 2,
        "K": 32,
        "V": 32,
        "D": 48,
        "F": 32,
        "P": 16,
        "C": 16,
        "N": 3,
        "sequences": 3,
    }
    selected = []
    for name, operation in operations().items():
        smaller = {"T": 5, "E": 9, "K": 3} if name.startswith(("assignments", "router_scores")) else largest
        shape = {letter: min(size, smaller.get(letter, size)) for letter, size in operation.check_shapes[0].items()}
        if "/window" in name:
            shape["W"] = 16
        if shape.get("H", 0) % shape.get("G", 1):
            shape["H"] = 2 * shape["G"]
        shapes_for_time = tuple(
            {letter: min(size, shape.get(letter, size)) for letter, size in timed.items()}
            for timed in operation.cpu_shapes[:1]
        )
        selected.append(dataclasses.replace(operation, check_shapes=(shape,), cpu_shapes=shapes_for_time, cpu_peers={}))
    assert run_gpu_check(selected, tmp_path, device="cpu", limit_s=3600), capsys.readouterr().out
    lines = correctness(tmp_path)
    assert {(line["op"], line["aspect"]) for line in lines} == {
        (op.name, aspect) for op in selected for aspect in ("option 0", "torch.compile")
    }
    assert {row.op for row in read_rows(tmp_path / "benchmark.csv", Timing)} == {
        CEILING,
        *(op.name for op in selected if op.cpu_shapes),
    }


def test_a_wrong_kernel_is_found_and_not_timed(tmp_path: Path, no_plot: None) -> None:
    operation = tiny("decayed_linear_attention/fixed", TINY)

    def call(backend: str, **inputs: Any):
        out, state = operation.call(**inputs, backend=backend)
        return (out if backend == "torch" else 1.01 * out), state

    assert not run_gpu_check([dataclasses.replace(operation, call=call)], tmp_path, device="cpu")
    assert {(line["aspect"], line["ok"]) for line in correctness(tmp_path)} == {
        ("option 0", "False"),
        ("torch.compile", "False"),
    }
    assert not (tmp_path / "benchmark.csv").exists()


def test_a_kernel_that_breaks_is_a_verdict_and_an_op_out_of_time_is_no_pass(tmp_path: Path, no_plot: None) -> None:
    norm = tiny("gated_rms_norm", {"B": 1, "T": 5, "H": 2, "D": 24})

    def breaks(backend: str, **inputs: Any) -> torch.Tensor:
        if backend == "triton":
            raise RuntimeError("out of resource: shared memory")
        return norm.call(**inputs, backend=backend)

    assert not run_gpu_check([dataclasses.replace(norm, call=breaks)], tmp_path, device="cpu")
    lines = correctness(tmp_path)
    assert {line["ok"] for line in lines} == {"False"}
    assert {line["where"] for line in lines if line["aspect"] == "option 0"} == {
        "RuntimeError: out of resource: shared memory"
    }
    assert not run_gpu_check([norm], tmp_path, device="cpu", limit_s=0.0)
    assert [(line["aspect"], line["ok"]) for line in correctness(tmp_path)] == [
        ("option 0", "True"),
        ("the rest", "False"),
    ]


def test_forcing_an_option_gives_it_alone_and_notes_it() -> None:
    table = launch_table("BLOCK", (64,), sm_80=[[(64, 8, 2), (32, 4, 2)]], sm_90=[(128, 8, 3)])

    def blocks(architecture: int) -> list[int]:
        return [option.blocks["BLOCK"] for option in table.options(40, architecture)]

    assert blocks(80) == [64, 32]
    seen = []
    for number, used in every_option():
        seen.append((number, blocks(80), blocks(90)))
        assert used == {(table, (80, 64), number), (table, (90, 64), 0)}
    assert seen == [(0, [64], [128]), (1, [32], [128])]
    assert [number for number, _ in every_option() if blocks(89)] == [0, 1]
    assert [number for number, _ in every_option() if blocks(100)] == [0]
    assert [number for number, _ in every_option()] == [0]
    assert blocks(80) == [64, 32]
    assert {option[1:] for option in all_options(80) if option[0] is table} == {((80, 64), 0), ((80, 64), 1)}
    assert {option[1:] for option in all_options(100) if option[0] is table} == {((90, 64), 0)}
    with pytest.raises(ValueError, match="head width 65"):
        table.options(65, 90)


@pytest.mark.parametrize(
    ("blocks", "widths", "line", "error"),
    [
        ("BLOCK_M BLOCK_N", (64,), [(64, 8, 2)], ValueError),
        ("BLOCK", (64, 128), [(64, 8, 2)], ValueError),
        ("BLOCK", (64,), [[(64, 8, 2)] * 5], AssertionError),
        ("BLOCK", (64,), [[]], AssertionError),
    ],
)
def test_a_launch_table_with_too_few_or_too_many_values_is_refused(
    blocks: str, widths: tuple, line: list, error: type
) -> None:
    with pytest.raises(error):
        launch_table(blocks, widths, sm_80=line)
