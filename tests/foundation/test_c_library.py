"""A C source is compiled once, by whoever comes first, and what keeps it from being compiled is said."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.c_library import c_library

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = {"twice": (ctypes.c_int, [ctypes.c_int])}
USED = """
import ctypes, sys
from pathlib import Path
from foundation.c_library import c_library
found = c_library([Path(sys.argv[1])], {"twice": (ctypes.c_int, [ctypes.c_int])}, flags=[])
print(found.library.twice(21) if found.library else found.reason)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HYBRID_MOE_NATIVE", raising=False)
    if c_library([ROOT / "corpus" / "refine" / "views.c"], {}, flags=[]).library is None:
        pytest.skip("there is no C compiler")
    path = tmp_path / "doubling.c"
    path.write_text("int twice(int x) { return 2 * x; }\n")
    return path


def counting_compiler(folder: Path, compiler: str) -> Path:
    """A compiler that leaves a line each time it compiles."""
    path = folder / "counting"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in --version) ;; *) echo x >> {folder}/compiled; sleep 1;; esac\n{compiler} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_of_several_processes_one_compiles(source, tmp_path, monkeypatch):
    made = c_library([source], SIGNATURES, flags=[])
    assert made.library is not None
    assert made.library.twice(21) == 42
    monkeypatch.setenv("CC", str(counting_compiler(tmp_path, made.reason.split()[2])))
    command = [sys.executable, "-c", USED, str(source)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["42\n"] * 3
    assert (tmp_path / "compiled").read_text() == "x\n"


def test_what_keeps_it_from_being_compiled_is_said(source, monkeypatch):
    source.write_text("int twice(int x) { return 2 * y; }\n")
    found = c_library([source], SIGNATURES, flags=[])
    assert found.library is None
    assert " failed: " in found.reason
    assert "y" in found.reason.split("error:")[1]
    monkeypatch.setenv("HYBRID_MOE_NATIVE", "0")
    assert c_library([source], SIGNATURES, flags=[]) == (None, "switched off by HYBRID_MOE_NATIVE=0")
    monkeypatch.delenv("HYBRID_MOE_NATIVE")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in c_library([source], SIGNATURES, flags=[]).reason
