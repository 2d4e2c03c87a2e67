"""Files that are either wholly there or not there, and that notice when a byte of them has changed.

Written under a temporary name, flushed to the disk and renamed: after a crash at any moment the old file or the new one
exists, never half of one. Plain renames are not enough (the data may reach the disk after the name), so files and their
folder are fsynced in that order. File systems that cannot fsync or lock weaken this, and a warning says so once.

Whatever a number depends on is sealed: `seal.json` in its folder holds a SHA-256 of each file and one of itself.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SEAL = "seal.json"
# What file systems answer that have no such thing: network and FUSE mounts, mostly.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EBADF}

# A disk without room, a user's share of it used up, a limit on the size of files.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)
_warned: set[str] = set()


class DiskFullError(OSError):
    """The disk has no room for what is about to be written, or ran out while it was written; what was there before is
    untouched."""


class CorruptFileError(ValueError):
    """A file's content is not what was written."""


def warn_once(kind: str, message: str) -> None:
    """One warning of a kind per process: what is true of a file system, or of old folders, is true of all of them."""
    if kind not in _warned:
        _warned.add(kind)
        log.warning(message)


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
        fsync(descriptor, path)
    finally:
        os.close(descriptor)


def fsync(descriptor: int, path: Path) -> None:
    """Flushes an open file; where its file system cannot, one warning says so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once(
            "fsync",
            f"{path}: this file system cannot flush to the disk ({error.strerror}); a power cut may lose what was"
            " written last",
        )


def try_lock(descriptor: int, path: Path) -> bool:
    """Takes the lock of an open file or folder, which goes with the process; False where another one holds it. Where
    the file system has no locks nobody is kept out, and one warning says so."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once(
            "flock",
            f"{path}: this file system has no locks ({error.strerror}); nothing keeps a second process out, so start"
            " only one",
        )
    return True


@contextlib.contextmanager
def naming(path: Path, otherwise: str) -> Iterator[None]:
    """A disk that runs full in the block becomes a DiskFullError that names `path`, and says what is left `otherwise`:
    the system's own message has no name once a file is open. Of nested blocks the outermost names what it makes: a
    file inside has a temporary name."""
    try:
        yield
    except OSError as error:
        reason = error.__cause__ if isinstance(error, DiskFullError) else error
        if not isinstance(reason, OSError) or reason.errno not in _FULL:
            raise
        raise DiskFullError(f"{path} could not be written: {reason.strerror}; {otherwise}") from reason


def write_text(path: Path, text: str) -> None:
    """Replaces `path` atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` atomically; a link stays one, and what is no file, a terminal say, is written to.

    Raises:
        DiskFullError: naming the file; the old one is untouched and nothing half-written is left.
    """
    path = Path(os.path.realpath(path))
    with naming(path, "nothing of it was changed"):
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                fsync(file.fileno(), temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    fsync_path(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what writes of files in `folder` left when their process was killed. Call it inside the folder's lock."""
    for leftover in (*folder.glob(".*.tmp"), *folder.glob("*.partial")):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` atomically by readable JSON."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Readable JSON as files hold it."""
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CorruptFileError: naming the file, where it is cut or no JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is no readable JSON: {error}; the file was cut or changed") from None


def read_json_lines(path: Path) -> list[Any]:
    """One value per line; a last line without its end is still being written, and left out.

    Raises:
        CorruptFileError: naming file and line.
    """
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values.append(json.loads(line.decode("utf-8")))
        except ValueError as error:
            raise CorruptFileError(f"{path}:{number} is no readable JSON: {error}; the file was changed") from None
    return values


@contextlib.contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to fill; when the block ends without an error it is flushed and renamed to `folder`.
    What killed processes left of earlier attempts goes first.

    Args:
        replace: an older `folder` makes room for the new one.

    Raises:
        OSError: when `folder` exists by then and is not empty, unless it is to be replaced. After any error the
            temporary folder is gone.
        DiskFullError: where the disk ran full; names the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_dead_folders(folder)
    temporary, lock = _own_folder(folder)
    try:
        with naming(folder, "nothing of it is left"):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                fsync_path(path)
        if replace and folder.exists():
            # Two renames, not a removal and one: a kill in between leaves the old content under the other name.
            old = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    fsync_path(folder.parent)


def _own_folder(folder: Path) -> tuple[Path, int]:
    """A new temporary folder and its lock, held while it is filled: one whose lock is free belongs to nobody."""
    while True:
        temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        # Another process may have taken it for a dead one before it was locked.
        if try_lock(lock, temporary) and temporary.exists():
            return temporary, lock
        os.close(lock)


def _remove_dead_folders(folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.{'[0-9a-f]' * 8}"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            # Without locks nobody can tell the dead from the living, and they stay.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """SHA-256 of the canonical JSON of `content`: equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files of a folder, for `check_digests`."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}


def check_digests(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares files of a folder with what `digests` said.

    Raises:
        CorruptFileError: naming the first file that is missing or differs, and how.
    """
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise CorruptFileError(f"{name} is missing")
        if (size := path.stat().st_size) != digest["bytes"]:
            raise CorruptFileError(f"{name} has {size} bytes instead of {digest['bytes']}")
        if sha256_file(path) != digest["sha256"]:
            raise CorruptFileError(f"{name} does not match its checksum")


def seal(folder: Path, names: Iterable[str]) -> None:
    """Seals files of a folder, beside those that are sealed already."""
    write_sealed(folder / SEAL, {"files": {**_sealed_files(folder), **digests(folder, names)}, "replacing": {}})


def write_into_seal(
    folder: Path, texts: Mapping[str, str], *, seal_too: Iterable[str] = (), anew: bool = False
) -> None:
    """Replaces text files of a sealed folder, in the given order, or seals a folder while writing its last files.

    After a crash at any moment each file is the old or the new one, and the seal knows both.

    Args:
        texts: by file name.
        seal_too: files that are there already and join the seal.
        anew: forget what an older seal says, and whether it is damaged: the files named here are all that count.
    """
    files = {**({} if anew else _sealed_files(folder)), **digests(folder, seal_too)}
    new = {
        name: {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in texts.items()
    }
    write_sealed(folder / SEAL, {"files": files, "replacing": new})
    for name, text in texts.items():
        write_text(folder / name, text)
    write_sealed(folder / SEAL, {"files": {**files, **new}, "replacing": {}})


def check_seal(folder: Path) -> None:
    """Compares a folder's files with its seal. A folder from before there were seals passes, with one warning.

    Raises:
        CorruptFileError: naming the folder, the file and what is wrong with it.
    """
    if not (folder / SEAL).exists():
        warn_once(
            "seal",
            f"{folder} was written without a seal: a changed byte in it, or in others like it, would go unnoticed",
        )
        return
    try:
        content = read_sealed(folder / SEAL)
        for name in {**content["files"], **content["replacing"]}:
            known = [part[name] for part in (content["replacing"], content["files"]) if name in part]
            try:
                check_digests(folder, {name: known[0]})
            except CorruptFileError:
                # A replacement that was cut short: the old file is as good. Its absence, too, if it was never there.
                if len(known) == 1:
                    raise
                check_digests(folder, {name: known[1]})
    except CorruptFileError as error:
        raise CorruptFileError(f"{folder}: {error}") from None


def _sealed_files(folder: Path) -> dict[str, Any]:
    """What the seal says of each file, replacements that came through before a crash included."""
    if not (folder / SEAL).exists():
        return {}
    try:
        content = read_sealed(folder / SEAL)
    except CorruptFileError as error:
        raise CorruptFileError(f"{folder}: {error}") from None
    arrived = {
        name: digest
        for name, digest in content["replacing"].items()
        if (folder / name).is_file() and sha256_file(folder / name) == digest["sha256"]
    }
    return {**content["files"], **arrived}


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
