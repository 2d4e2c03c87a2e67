"""The architecture as a test: imports point down the layers and form no circles, sub-folders included; our packages are
the ones in this checkout; a long file has a reason."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW: dict[str, set[str]] = {"foundation": set()}
BELOW["triton_kernels"] = BELOW["corpus"] = {"foundation"}
BELOW["attention"] = BELOW["routing"] = {"foundation", "triton_kernels"}
BELOW["moe"] = BELOW["routing"] | {"routing"}
# `lm` reads `corpus` for one thing: text in and out of `python -m lm generate` goes through the tokenizer.
BELOW["lm"] = BELOW["moe"] | {"moe", "attention", "corpus"}
BELOW["staged_training"] = BELOW["lm"] | {"lm"}
BELOW["ablations"] = BELOW["staged_training"] | {"staged_training"}
BELOW["demos"] = BELOW["ablations"] | {"ablations"}

# The same inside a package: its folders, and what each may import of the others. Files that lie in no folder
# (`__main__.py`) stand above all of them.
ROOMS: dict[str, dict[str, set[str]]] = {
    "triton_kernels": {
        "common": set(),
        "native": set(),
        "softmax": {"common", "native"},
        "linear": {"common", "native"},
        "experts": {"common", "native"},
        "mixed": {"common", "native", "softmax", "linear"},
        "tools": {"common", "native", "softmax", "linear", "experts", "mixed"},
    }
}

# Files past 400 lines, each with the reason why it is one idea.
LONG_FILES: dict[str, str] = {
    "staged_training.execute": "one plan from its trunk to its last branch: every part reads what the one before left",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for package in BELOW for path in sorted((ROOT / package).rglob("*.py"))}


def imported_modules(path: Path) -> dict[str, int]:
    """Modules of this checkout that a file imports, at its top or inside functions, with the line."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from package import module` names a module, `from module import name` does not.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in whole]
        for name in names:
            if name in MODULES:
                found.setdefault(name, node.lineno)  # pyright: ignore[reportAttributeAccessIssue]
    return found


IMPORTS = {name: imported_modules(path) for name, path in MODULES.items()}


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down(package):
    upward = [
        f"{name}:{line} imports {other}"
        for name, others in IMPORTS.items()
        for other, line in others.items()
        if name.split(".")[0] == package and other.split(".")[0] not in BELOW[package] | {package}
    ]
    assert not upward, "\n".join(upward)


def room_of(name: str, package: str) -> str:
    """The folder of `package` that a module lies in, or "" where it lies in none."""
    below, _, rest = name.removeprefix(f"{package}.").partition(".")
    return below if rest or (ROOT / package / below).is_dir() else ""


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_down_inside_a_package(package):
    rooms = ROOMS[package]
    inside = {name: room_of(name, package) for name in MODULES if name.startswith(f"{package}.")}
    assert set(inside.values()) - {""} == rooms.keys()
    upward = [
        f"{name}:{line} imports {other}"
        for name, room in inside.items()
        if room
        for other, line in IMPORTS[name].items()
        if other in inside and inside[other] not in rooms[room] | {room}
    ]
    assert not upward, "\n".join(upward)


def circles(graph: dict[str, dict[str, int]]) -> list[list[str]]:
    """A circle for every module that reaches itself, as the modules on the way."""
    found, done = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in graph[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_no_circles():
    assert not circles(IMPORTS), "\n".join(" -> ".join(circle) for circle in circles(IMPORTS))


def test_a_circle_is_found():
    assert circles({"a": {"b": 1}, "b": {"c": 1}, "c": {"b": 1}}) == [["b", "c", "b"]]


@pytest.mark.parametrize("package", BELOW)
def test_packages_resolve_in_the_checkout(package):
    # moe, attention, routing and triton_kernels are also names of packages on PyPI or inside Triton and vLLM.
    assert Path(importlib.import_module(package).__file__ or "").resolve().parent == ROOT / package


def test_long_files_have_a_reason():
    long = {name for name, path in MODULES.items() if path.read_text().count("\n") > 400}
    assert long == LONG_FILES.keys(), f"past 400 lines, or listed without being it: {long ^ LONG_FILES.keys()}"
