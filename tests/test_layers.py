"""The architecture as a test: imports point down the layers, and our packages are the ones in this checkout."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED: dict[str, set[str]] = {"triton_kernels": set(), "corpus": set()}
ALLOWED["attention"] = ALLOWED["routing"] = {"triton_kernels"}
ALLOWED["moe"] = {"triton_kernels", "routing"}
# `lm` reads `corpus` for one thing: text in and out of `python -m lm generate` goes through the tokenizer.
ALLOWED["lm"] = {"triton_kernels", "attention", "routing", "moe", "corpus"}
ALLOWED["staged_training"] = ALLOWED["lm"] | {"lm"}
ALLOWED["ablations"] = ALLOWED["staged_training"] | {"staged_training"}
ALLOWED["demos"] = ALLOWED["ablations"] | {"ablations"}


def imported_packages(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, name in imported_packages(path)
        if name in ALLOWED and name != package and name not in ALLOWED[package]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_resolve_in_the_checkout(package):
    # moe, attention, routing and triton_kernels are also names of packages on PyPI or inside Triton and vLLM.
    assert Path(importlib.import_module(package).__file__ or "").resolve().parent == ROOT / package


@pytest.mark.parametrize("package", ALLOWED)
def test_files_stay_readable(package):
    lengths = {path.relative_to(ROOT): path.read_text().count("\n") for path in sorted((ROOT / package).rglob("*.py"))}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > 300}
    assert not too_long, f"files hold one idea in at most 300 lines: {too_long}"
