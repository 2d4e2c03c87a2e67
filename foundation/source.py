"""What the source says, so that a result can be told by the code that made it.

A Python file's fingerprint is that of its meaning: its syntax tree without docstrings. Comments, docstrings and the
breaking of lines change nothing; another number, operator or word in a message does. C sources are taken as text.

Parsing takes a second for all of this project, so meanings are kept in the user's cache folder, by the text they were
read from.
"""

import ast
import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from foundation.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 16


@functools.cache
def code_of(modules: tuple[str, ...]) -> dict[str, str]:
    """Fingerprints of these modules and of everything of this checkout that they import, directly or not, at their top
    or inside of a function.

    Imports by a name that is only known when they run (`routing.policies`, which imports what lies in its folder) are
    not followed: name such modules.

    Returns:
        by path below the root of the checkout. C sources that lie beside a module are among them.
    """
    found: dict[str, str] = {}
    done, waiting, n_kept = set(), list(modules), len(_kept())
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        # A module of somebody else's, or a name inside of one.
        if module in done or path is None:
            continue
        done.add(module)
        found[_name(path)], imports = _meaning(path)
        # Importing a module runs the packages around it.
        waiting += [*imports, module.rpartition(".")[0]]
        for source in path.parent.glob("*.[ch]"):
            found[_name(source)] = file_code(source)
    if len(_kept()) > n_kept:
        # A home that cannot be written to costs a second per command.
        with contextlib.suppress(OSError):
            _cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(_cache_file(), _kept())
    return dict(sorted(found.items()))


@functools.cache
def file_code(path: Path) -> str:
    """The fingerprint of one file."""
    return _meaning(path)[0] if path.suffix == ".py" else _digest(path.read_bytes())


def user_cache() -> Path:
    """Where this project keeps, for this user, what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hybrid-moe-lab"


def _file_of(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _meaning(path: Path) -> tuple[str, list[str]]:
    """A Python file's fingerprint, and what it imports."""
    text = path.read_bytes()
    key = _digest(text)
    if key not in _kept():
        tree = ast.parse(text, filename=str(path))
        _kept()[key] = _digest("".join(_words(tree)).encode()), sorted(set(_imports(tree)))
    return _kept()[key]


def _words(node: object) -> Iterator[str]:
    """A syntax tree as text. Not `ast.dump`, whose words for the same tree change with the version of Python."""
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                value = value if ast.get_docstring(node, clean=False) is None else value[1:]
            if value is not None and value != []:
                yield f"{name}="
                yield from _words(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _words(item)
        yield "]"
    else:
        yield f"{node!r},"


def _imports(tree: ast.AST) -> Iterator[str]:
    """What may be modules among the names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _cache_file() -> Path:
    # Another reader of meanings, or another Python, reads them anew.
    return user_cache() / f"meanings-{_digest(Path(__file__).read_bytes())}-{sys.version_info.minor}.json"


@functools.cache
def _kept() -> dict[str, tuple[str, list[str]]]:
    """What `_meaning` has found, by the digest of the text."""
    # Missing, or written by two processes at once.
    with contextlib.suppress(OSError, ValueError):
        return {key: (digest, imports) for key, (digest, imports) in read_json(_cache_file()).items()}
    return {}
