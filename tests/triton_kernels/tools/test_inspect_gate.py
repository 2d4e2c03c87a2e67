"""The offline gate: the committed table was made from the kernels as they are and keeps to its bars, and the gate finds
what it should.

Compiling every op anew takes five minutes for sm_90, and half an hour with sm_80, sm_100 and every option of every
launch table: `make gate`, after a change of kernels. Here one op stands for the others.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import triton_kernels.__main__ as command_line
from foundation.source import code_of
from foundation.tables import read_rows
from triton_kernels.tools import inspect_table
from triton_kernels.tools.inspect_recorder import resident_blocks
from triton_kernels.tools.inspect_table import TOTAL, Row, Spill, gate, kernel_code, new_spills, record
from triton_kernels.tools.operations import operations

ROOT = Path(__file__).resolve().parents[3]
RECORDED = ROOT / "notes" / "kernels" / "inspect.csv"
OP = "decayed_linear_attention"


# What linear attention may cost at this shape in bf16 on sm_90: launches, and bytes over the floor, which is this many
# bytes per token and head.
BAR_SHAPE = {"B": 1, "T": 4096, "H": 16, "K": 128, "V": 128}
BARS = {
    ("decayed_linear_attention/token", "forward"): (2, 1.5, 1028),
    ("decayed_linear_attention/token", "backward"): (3, 2.2, 1800),
    ("decayed_linear_attention/fixed", "forward"): (2, 1.5, 1024),
    ("decayed_linear_attention/fixed", "backward"): (3, 2.2, 1792),
    ("gated_delta_rule", "forward"): (3, 2.5, 1032),
    ("gated_delta_rule", "backward"): (4, 3.5, 1808),
    ("kimi_delta_attention", "forward"): (4, 2.5, 1540),
    ("kimi_delta_attention", "backward"): (5, 4.0, 2824),
}
WITH_BARS = sorted({name.split("/")[0] for name, _ in BARS})
FAMILIES = sorted({name.split("/")[0] for name in operations()} - set(WITH_BARS))
QUICK = "gated_rms_norm"


def run_gate(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "triton_kernels", "inspect", "--gate", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing wrong" in done.stdout


def assert_within_bars(family: str, table: Path) -> None:
    rows = [row for row in read_rows(table, Row) if row.source == "ours" and row.arch == 90]
    for (name, direction), (launches, ratio, floor) in BARS.items():
        if name.split("/")[0] == family:
            assert BAR_SHAPE.items() <= operations()[name].inspect_shape.items()
            kernels = [row for row in rows if (row.op, row.direction) == (name, direction) and row.kernel != TOTAL]
            (total,) = [row for row in rows if (row.op, row.direction, row.kernel) == (name, direction, TOTAL)]
            assert total.launches == len(kernels) <= launches
            assert total.operators == 0
            assert total.bytes <= ratio * floor * BAR_SHAPE["T"] * BAR_SHAPE["H"]
            products = [row for row in kernels if row.kernel not in operations()[name].without_products]
            assert products
            assert all(row.hgmma > 0 for row in products)
            # The scans of one sequence fill an H200, but for the few slices that 16 heads of 128 have forward in the
            # delta rules.
            assert all(row.programs >= 128 for row in kernels)


def test_the_record_is_of_the_kernels_as_they_are() -> None:
    rows = [row for row in read_rows(RECORDED, Row) if row.source == "ours"]
    stale = sorted({row.op for row in rows if row.code != kernel_code(row.op)})
    assert not stale, (
        f"made from other code: python -m triton_kernels inspect --gate --arch 80 90 100 --csv {RECORDED} --op"
        f" {' '.join(stale)}"
    )


def test_the_code_of_an_op_is_that_of_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: kernel_code(name) for name in ("flash_attention", "flash_decode/paged", "gated_delta_rule")}
    assert before["flash_attention"] == before["flash_decode/paged"] != before["gated_delta_rule"]
    files = code_of(("triton_kernels.tools.catalogue.softmax",))
    edited = "triton_kernels/softmax/flash_attention_kernels.py"
    for file, moves in ((edited, True), ("triton_kernels/softmax/flash_attention_torch.py", False)):
        monkeypatch.setattr(inspect_table, "code_of", lambda _, file=file: {**files, file: "edited"})
        kernel_code.cache_clear()
        assert (kernel_code("flash_attention") != before["flash_attention"]) == moves
    monkeypatch.undo()
    kernel_code.cache_clear()


@pytest.mark.parametrize(
    "family", [family if family == QUICK else pytest.param(family, marks=pytest.mark.long) for family in FAMILIES]
)
def test_compiled_for_hopper_every_op_keeps_to_the_recorded_table(
    compile_environment: dict[str, str], family: str
) -> None:
    run_gate(compile_environment, "--op", family, "--arch", "90")


@pytest.mark.long
@pytest.mark.parametrize("family", WITH_BARS)
def test_compiled_for_hopper_linear_attention_keeps_to_its_bars(
    compile_environment: dict[str, str], family: str, tmp_path: Path
) -> None:
    run_gate(compile_environment, "--op", family, "--arch", "90", "--csv", str(tmp_path / "table.csv"))
    assert_within_bars(family, tmp_path / "table.csv")


@pytest.mark.parametrize("family", WITH_BARS)
def test_what_is_recorded_keeps_to_the_bars(family: str) -> None:
    assert_within_bars(family, RECORDED)


def test_every_op_is_on_record_for_every_architecture_and_none_spills() -> None:
    rows = [row for row in read_rows(RECORDED, Row) if row.source == "ours"]
    assert {(row.op, row.arch) for row in rows} == {
        (name, architecture) for name in operations() for architecture in (80, 90, 100)
    }
    assert [row for row in rows if row.spills or row.stack] == []


# Run in a process that compiles, one for both: what each test is of is a function.
PROGRAM = """
import json, sys, traceback
import torch
from functools import partial
from triton_kernels.common.checks import check_cu_seqlens
from triton_kernels.common.launch_tables import every_option
from triton_kernels.tools.inspect_recorder import record_passes, recording
from triton_kernels.tools.operations import all_options, operations

def options():
    seen = {80: set(), 90: set(), 100: set()}
    for operation in operations().values():
        call = partial(operation.call, backend="triton")
        dtypes = (torch.bfloat16, torch.float32)
        for inputs in (operation.inputs(dtype, "cpu", **shape) for dtype in dtypes for shape in operation.check_shapes):
            for architecture in seen:
                for _, used in every_option():
                    passes = record_passes(call, inputs, architecture, compiles=False)
                    _, backward = operation.cost(2, **operation.inspect_shape)
                    assert passes.keys() == ({"forward", "backward"} if backward else {"forward"}), operation.name
                    seen[architecture] |= used
    for architecture, reached in seen.items():
        missing = [(key, table.lines[key][number]) for table, key, number in all_options(architecture) - reached]
        assert not missing, (architecture, missing)

def waits():
    waits = {
        "aten::_local_scalar_dense": lambda x: x[0].item(),
        "aten::_local_scalar_dense ": lambda x: [0] if x.any() else [1],
        "aten::nonzero": lambda x: x.nonzero(),
        "aten::index": lambda x: x[x > 1],
        "aten::index_put_": lambda x: x.clone().index_put_((x > 1,), x[:1]),
        "aten::masked_select": lambda x: x.masked_select(x > 1),
        "aten::repeat_interleave": lambda x: x.repeat_interleave(x),
        "aten::equal": lambda x: torch.equal(x, x),
        "Tensor.tolist": lambda x: x.tolist(),
        "Tensor.cpu": lambda x: x.cpu(),
        "Tensor.numpy": lambda x: x.numpy(),
    }
    reads = lambda x: x.new_full((), x.sum().item())
    op = torch.library.custom_op("test::reads", reads, mutates_args=(), schema="(Tensor x) -> Tensor")
    waits["aten::item"] = op
    for name, wait in waits.items():
        with recording(90):
            try:
                wait(torch.arange(3))
            except RuntimeError as error:
                assert str(error).startswith(name.strip() + " reads values"), (name, error)
            else:
                raise AssertionError(name)
    offsets = torch.tensor([0, 9, 7])
    with recording(90) as launches:
        assert torch.arange(3)[torch.tensor([2, 0])].shape == (2,)
        check_cu_seqlens("op", offsets, 1, 7)
    with recording(90, may_wait=True):
        assert offsets.tolist() == [0, 9, 7] and offsets[1].item() == 9
    try:
        check_cu_seqlens("op", offsets, 1, 7)
    except ValueError as error:
        assert "must rise" in str(error)
    else:
        raise AssertionError

problems = {}
for each in (options, waits):
    try:
        each()
    except BaseException:
        problems[each.__name__] = traceback.format_exc()
print(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What went wrong, by function of the program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_op_waits_for_the_device_and_the_checked_shapes_reach_every_option(problems: dict[str, str]) -> None:
    """Every operation, forward and backward, at every shape with every option: the recorder refuses what hands a value
    to the host."""
    assert "options" not in problems, problems["options"]


def test_the_recorder_names_what_waits_for_the_device(problems: dict[str, str]) -> None:
    assert "waits" not in problems, problems["waits"]


def test_a_spill_is_a_problem_unless_one_as_bad_is_on_record(tmp_path: Path) -> None:
    spill = Spill(
        op="flash_attention",
        arch=90,
        dtype="float32",
        shape="T=1",
        option=0,
        kernel="forward_kernel",
        stack=64,
        local=30,
    )
    assert len(new_spills([spill], [])) == 1
    assert new_spills([spill], [spill]) == []
    assert len(new_spills([dataclasses.replace(spill, stack=72)], [spill])) == 1
    path, other = tmp_path / "spills.csv", dataclasses.replace(spill, arch=80)
    record(path, Spill, [spill, other], {spill.subject, other.subject})
    record(path, Spill, [], {spill.subject})
    assert read_rows(path, Spill) == [other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "spills"),
        ({"hgmma": 0}, "no HGMMA"),
        ({"launches": 9, "kernel": TOTAL}, "launches 9"),
        ({"bytes": 10**12, "kernel": TOTAL}, "bytes 1000000000000"),
        ({"operators": 3, "kernel": TOTAL}, "operators 3"),
    ],
)
def test_the_gate_finds(change: dict, message: str) -> None:
    recorded = [
        row for row in read_rows(RECORDED, Row) if row.op == f"{OP}/token" and row.arch == 90 and row.source == "ours"
    ]
    assert gate(recorded, recorded, operations()) == []
    wanted = change.get("kernel", "backward_kernel")
    row = next(row for row in recorded if row.kernel == wanted)
    problems = gate([dataclasses.replace(row, **change)], recorded, operations())
    assert len(problems) == 1
    assert message in problems[0]


def test_the_gate_compares_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table that --csv names may be the very one that --gate compares with: worse rows fail, again and again."""
    name = f"{OP}/token"
    rows = [row for row in read_rows(RECORDED, Row) if row.subject == (name, "ours", 90)]
    better = [dataclasses.replace(row, bytes=row.bytes - 1) if row.kernel == TOTAL else row for row in rows]
    table = tmp_path / "inspect.csv"
    record(table, Row, better, {row.subject for row in rows})
    monkeypatch.setattr(command_line, "RECORDED", table)
    monkeypatch.setattr(inspect_table, "inspect_operation", lambda *_: rows)
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            command_line.main(["inspect", "--op", name, "--gate", "--csv", str(table)])
        assert left.value.code == 1
        assert "recorded" in capsys.readouterr().out
    # Without the gate the table is written, and with rows as recorded too.
    command_line.main(["inspect", "--op", name, "--csv", str(table)])
    assert read_rows(table, Row) == rows
    command_line.main(["inspect", "--op", name, "--gate", "--csv", str(table)])
    assert "nothing wrong" in capsys.readouterr().out


def test_a_row_nobody_recorded_is_a_problem() -> None:
    rows = [row for row in read_rows(RECORDED, Row) if row.kernel == TOTAL and row.source == "ours"][:1]
    assert "not recorded" in gate(rows, [], operations())[0]


def test_csv_round_trip_keeps_other_ops(tmp_path: Path) -> None:
    rows = read_rows(RECORDED, Row)
    path = tmp_path / "table.csv"
    record(path, Row, rows, {row.subject for row in rows})
    record(path, Row, [row for row in rows if row.subject == rows[0].subject], {rows[0].subject})
    assert sorted(map(str, read_rows(path, Row))) == sorted(map(str, rows))
    assert path.read_text() == RECORDED.read_text()


def test_occupancy_is_the_tightest_limit() -> None:
    assert resident_blocks(registers=255, warps=4, shared=0, architecture=90) == 2
    assert resident_blocks(registers=32, warps=4, shared=100 * 1024, architecture=90) == 2
    assert resident_blocks(registers=16, warps=1, shared=0, architecture=90) == 32
