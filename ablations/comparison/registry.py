"""Finds the methods: every file of `ablations/` that defines `METHOD` is one, under the name of the file."""

import functools
import importlib
import re
from pathlib import Path

from ablations.method import Method
from foundation.serialize import nearest

FOLDER = Path(__file__).parents[1]
BASELINE = "baseline"


@functools.cache
def all_methods() -> dict[str, Method]:
    """Every method there is.

    Returns:
        By name: the baseline and the controls first, then in the order of their names.

    Raises:
        ValueError: for a method that does not bear the name of its file.
    """
    methods = {}
    for path in sorted(FOLDER.glob("*.py")):
        # Reading before importing: only files that define a method are imported.
        if not re.search(r"^METHOD\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            continue
        method = importlib.import_module(f"ablations.{path.stem}").METHOD
        if method.name != path.stem:
            raise ValueError(
                f"ablations/{path.name} defines a method named {method.name!r}; a method bears the name of its file"
            )
        methods[method.name] = method
    return dict(sorted(methods.items(), key=lambda item: (item[0] != BASELINE, not item[1].is_control, item[0])))


def find_methods(names: list[str]) -> list[Method]:
    """The named methods with the baseline put first, added where it is missing.

    Args:
        names: as `python -m ablations list` shows them; duplicates count once.

    Raises:
        ValueError: for an unknown name, with the nearest legal one.
    """
    known = all_methods()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no method {unknown[0]!r}; {nearest(unknown[0], known)}")
    return [known[name] for name in dict.fromkeys([BASELINE, *names])]


def sources_of(methods: list[Method]) -> dict[str, dict[str, Path]]:
    """By method, the files that its results depend on beside those of training: its own, and what measures it."""
    paths = {method.name: (FOLDER / f"{method.name}.py", FOLDER / "comparison" / "measure.py") for method in methods}
    return {
        name: {path.relative_to(FOLDER.parent).as_posix(): path for path in files if path.is_file()}
        for name, files in paths.items()
    }
