"""Files that are either wholly there or not there, and that notice when a byte of them has changed.

Written under a temporary name, flushed to the disk and renamed: after a crash at any moment the old file or the new one
exists, never half of one. Plain renames are not enough (the data may reach the disk after the name), so files and their
folder are fsynced in that order.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DiskFullError(OSError):
    """The disk has no room for what is about to be written, or ran out while it was written; what was there before is
    untouched."""


class CorruptFileError(ValueError):
    """A file's content is not what was written."""


def require_space(folder: Path, n_bytes: int, purpose: str) -> None:
    """Refuses to begin a write that cannot end.

    Raises:
        DiskFullError: naming the folder, what is needed and what is free.
    """
    # Tensor files carry headers and file systems round up; 1 % and a mebibyte cover both.
    needed = n_bytes + n_bytes // 100 + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{purpose} needs {needed / 2**20:.1f} MiB in {folder}, {free / 2**20:.1f} MiB are free; nothing was"
            " written"
        )


def fsync_path(path: Path) -> None:
    """Flushes a file or a folder (its names) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` atomically by readable JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; when the block ends without an error it is flushed and renamed to `folder`.

    Raises:
        OSError: when `folder` exists by then and is not empty. After any error the temporary folder is gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync_path(path)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """SHA-256 of the canonical JSON of `content`: equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON together with its own fingerprint, so that a change of any byte of it is noticed by `read_sealed`."""
    write_text(path, _sealed(content))


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Raises:
        CorruptFileError: when the file is missing, unreadable, or differs from what was written in any byte.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)["content"]
    except FileNotFoundError:
        raise CorruptFileError(f"{path.name} is missing") from None
    except (UnicodeDecodeError, ValueError, KeyError, TypeError):
        raise CorruptFileError(f"{path.name} is not readable") from None
    # Serialising again and comparing bytes also catches changes that JSON ignores, such as white space or an escape
    # spelt differently.
    if _sealed(content) != text:
        raise CorruptFileError(f"{path.name} does not match its own checksum")
    return content


def _sealed(content: dict[str, Any]) -> str:
    return json.dumps({"content": content, "sha256": fingerprint(content)}, indent=1) + "\n"
