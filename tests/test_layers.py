"""The architecture as a test: imports point down the layers, our packages are the ones in this checkout, files and the
kernels stay short."""

import ast
import importlib
import io
import tokenize
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


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings, as counters of lines of code count."""
    text, held = path.read_text(), set()
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def test_the_kernels_stay_few():
    total = sum(code_lines(path) for path in (ROOT / "triton_kernels").glob("*.py"))
    assert total < 5000, f"triton_kernels has {total} lines of code"
