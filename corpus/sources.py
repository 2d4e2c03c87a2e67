"""Where documents come from: the Python standard library of the running interpreter, or the user's own files and
folders."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from corpus.readers import LEGAL, Document, Skipped, place_of, read_file, read_text, suffix_of

# Installed packages are not the standard library; tests are mostly literals and near-copies of each other.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
# The generated character tables in encodings/ all define one of these two names, and nothing written by hand there
# does.
ENCODING_TABLE_NAMES = (b"decoding_table", b"decoding_map")


def read_standard_library(root: Path | None = None) -> Iterator[Document | Skipped]:
    """One document per .py file (docstrings included), sorted by path.

    Left out: `EXCLUDED_FOLDERS`, the generated tables in encodings/, empty files.

    Args:
        root: the running interpreter's library by default.

    Raises:
        ValueError: where there is no source file.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    walked = _walk(root, excluded_folders=EXCLUDED_FOLDERS)
    paths = [path for path in walked if path.suffix == ".py" and path.is_file()]
    if not paths:
        raise ValueError(
            f"no .py file in {root}: this Python keeps its standard library elsewhere; give your own text with --data"
        )
    for path in paths:
        if path.stat().st_size == 0 or _is_encoding_table(path):
            continue
        yield from read_text(path)


def read_paths(data: Sequence[str], *, text_field: str) -> Iterator[Document | Skipped]:
    """Documents of files and folders, in the order given; see `find_files`.

    Args:
        text_field: column or key that holds the text, `meta.text` for one inside of another.

    Raises:
        ValueError: as `find_files`; before anything is read.
    """
    paths, unknown = find_files(data)
    for path in paths:
        yield from read_file(path, text_field=text_field)
    for path in unknown:
        no_file = suffix_of(path) is not None
        reason = "a link to nothing, or no file" if no_file else f"unknown file type; legal are {LEGAL}"
        yield Skipped(place_of(path), reason)


def find_files(data: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Files to read, in the order given, and what else the folders hold: files of unknown types, links to nothing.

    A folder is walked in sorted order and gives its files of a known type. Hidden files and folders are left out.

    Raises:
        ValueError: for a path that does not exist, a file of unknown type, or a folder with nothing to read.
    """
    paths: list[Path] = []
    unknown: list[Path] = []
    for name in data:
        if not name:
            raise ValueError("an empty path among the data paths")
        path = Path(name)
        if path.is_dir():
            walked = _walk(path)
            # Opening a named pipe would block for ever.
            found = [file for file in walked if suffix_of(file) is not None and file.is_file()]
            if not found:
                raise ValueError(f"{place_of(path)}: no file of a known type in this folder")
            unknown += [file for file in walked if suffix_of(file) is None or not file.is_file()]
            paths += found
        elif not path.exists():
            raise ValueError(f"{place_of(path)}: no such file or folder")
        elif suffix_of(path) is None:
            raise ValueError(f"{place_of(path)}: unknown file type; legal are {LEGAL}")
        else:
            paths.append(path)
    return paths, unknown


def _walk(root: Path, excluded_folders: frozenset[str] = frozenset()) -> list[Path]:
    """What is no folder below `root`, sorted by relative path; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{place_of(Path(error.filename))}: the folder cannot be listed: {error.strerror}") from error

    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in excluded_folders and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _is_encoding_table(path: Path) -> bool:
    if path.parent.name != "encodings":
        return False
    source = path.read_bytes()
    return any(name in source for name in ENCODING_TABLE_NAMES)
