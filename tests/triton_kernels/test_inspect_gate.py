"""The offline gate: decayed linear attention compiled for sm_90 keeps to its bars and to the committed table; and the gate finds what it is for."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from triton_kernels.configurations import operations
from triton_kernels.inspect_binary import resident_blocks
from triton_kernels.inspect_table import TOTAL, gate, read_csv, write_csv

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "notes" / "kernels" / "inspect.csv"
OP = "decayed_linear_attention"


def test_compiled_for_hopper_it_keeps_to_the_recorded_table(compile_environment: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "now.csv"
    command = [sys.executable, "-m", "triton_kernels", "inspect", "--op", OP, "--arch", "90", "--gate", "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, env=compile_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    totals = {(row.op, row.direction): row for row in read_csv(table) if row.kernel == TOTAL}
    for variant in ("token", "fixed"):
        forward, backward = totals[f"{OP}/{variant}", "forward"], totals[f"{OP}/{variant}", "backward"]
        assert (forward.launches <= 2, forward.operators) == (True, 0)
        assert forward.floor_ratio <= 1.5
        assert (backward.launches <= 3, backward.operators) == (True, 0)
        assert backward.floor_ratio <= 2.2
    scans = [row for row in read_csv(table) if row.kernel in ("forward_kernel", "backward_kernel") and row.hgmma > 8]
    assert scans
    assert all(row.programs >= 132 for row in scans)


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
    recorded = [row for row in read_csv(RECORDED) if row.op == f"{OP}/token" and row.arch == 90 and row.source == "ours"]
    assert gate(recorded, recorded, operations()) == []
    wanted = change.get("kernel", "backward_kernel")
    row = next(row for row in recorded if row.kernel == wanted)
    problems = gate([dataclasses.replace(row, **change)], recorded, operations())
    assert len(problems) == 1
    assert message in problems[0]


def test_a_row_nobody_recorded_is_a_problem() -> None:
    rows = [row for row in read_csv(RECORDED) if row.kernel == TOTAL and row.source == "ours"][:1]
    assert "not recorded" in gate(rows, [], operations())[0]


def test_csv_round_trip_keeps_other_ops(tmp_path: Path) -> None:
    rows = read_csv(RECORDED)
    path = tmp_path / "table.csv"
    write_csv(path, rows)
    first = [row for row in rows if row.op == rows[0].op and row.arch == rows[0].arch and row.source == rows[0].source]
    write_csv(path, first)
    assert sorted(map(str, read_csv(path))) == sorted(map(str, rows))


def test_occupancy_is_the_tightest_limit() -> None:
    assert resident_blocks(registers=255, warps=4, shared=0, architecture=90) == 2
    assert resident_blocks(registers=32, warps=4, shared=100 * 1024, architecture=90) == 2
    assert resident_blocks(registers=16, warps=1, shared=0, architecture=90) == 32
