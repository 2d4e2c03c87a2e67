"""Files are there whole or not at all, and notice a changed byte."""

import errno
import json
import os

import pytest

from foundation import files
from foundation.files import CorruptFileError, DiskFullError, atomic_folder, fingerprint, read_sealed, write_sealed
from staged_training.record import locked


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})

    def no_rename(*_):
        raise OSError("power cut")

    monkeypatch.setattr(files.os, "replace", no_rename)
    with pytest.raises(OSError, match="power cut"):
        files.write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}


@pytest.mark.parametrize("position", range(0, 60, 7))
def test_any_changed_byte_of_a_sealed_file_is_noticed(tmp_path, position):
    path = tmp_path / "manifest.json"
    write_sealed(path, {"step": 12, "files": ["weights"]})
    assert read_sealed(path) == {"step": 12, "files": ["weights"]}
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"manifest.json"):
        read_sealed(path)


def test_a_missing_sealed_file_is_named(tmp_path):
    with pytest.raises(CorruptFileError, match=r"manifest.json is missing"):
        read_sealed(tmp_path / "manifest.json")


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    def stop_half_way():
        with atomic_folder(tmp_path / "corpus") as temporary:
            (temporary / "part").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "corpus") as temporary:
        (temporary / "part").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_write_that_cannot_end_is_not_begun(tmp_path):
    with pytest.raises(DiskFullError, match=r"the cache needs .* MiB in .* are free; nothing was written"):
        files.require_space(tmp_path, 2**60, "the cache")


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_a_seal_names_what_was_changed_and_survives_a_crash_at_any_write(tmp_path, monkeypatch):
    (tmp_path / "metrics").write_text("1\n")
    files.write_into_seal(tmp_path, {"ledger": "old", "result": "3"}, seal_too=["metrics"])
    files.check_seal(tmp_path)
    whole, n_writes = files.write_text, 0

    def crash(path, text):
        nonlocal n_writes
        n_writes += 1
        if n_writes == stop:
            raise OSError("power cut")
        whole(path, text)

    # The seal that knows both, the file, the seal that knows the new one.
    for stop in (1, 2, 3):
        n_writes = 0
        with monkeypatch.context() as patched:
            patched.setattr(files, "write_text", crash)
            with pytest.raises(OSError, match="power cut"):
                files.write_into_seal(tmp_path, {"ledger": f"new {stop}"})
        files.check_seal(tmp_path)
        files.write_into_seal(tmp_path, {"result": "4"})
        files.check_seal(tmp_path)
    for name in ("ledger", "metrics", "result"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text("x" + text[1:])
        with pytest.raises(CorruptFileError, match=f"{name} does not match its checksum"):
            files.check_seal(tmp_path)
        (tmp_path / name).write_text(text)


def test_cut_json_names_its_file(tmp_path):
    (tmp_path / "result.json").write_text('{"a": 1, "b"')
    with pytest.raises(CorruptFileError, match=r"result\.json is no readable JSON.*cut or changed"):
        files.read_json(tmp_path / "result.json")
    # The last line is still being written; the one before it is not.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(CorruptFileError, match=r"metrics\.jsonl:2 is no readable JSON"):
        files.read_json_lines(tmp_path / "metrics.jsonl")


def refuse(code):
    def call(*_):
        raise OSError(code, os.strerror(code))

    return call


def test_without_fsync_or_locks_one_warning_and_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_warned", set())
    monkeypatch.setattr(files.os, "fsync", refuse(errno.EINVAL))
    monkeypatch.setattr(files.fcntl, "flock", refuse(errno.ENOLCK))
    for number in range(2):
        with locked(tmp_path):
            files.write_json(tmp_path / "state.json", {"step": number})
        with atomic_folder(tmp_path / f"folder_{number}") as temporary:
            (temporary / "part").write_text("x")
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 1}
    assert caplog.text.count("cannot flush to the disk") == 1
    assert caplog.text.count("has no locks") == 1
    # A disk that fails is another matter.
    monkeypatch.setattr(files.os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=r"\[Errno 5\]"):
        files.write_json(tmp_path / "state.json", {"step": 2})


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    files.write_json(tmp_path / "result.json", {"step": 1})
    monkeypatch.setattr(files.os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(DiskFullError, match=r"result\.json could not be written: No space left"):
        files.write_json(tmp_path / "result.json", {"step": 2})

    def fill():
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "weights").write_text("x")

    with pytest.raises(DiskFullError, match="model could not be written: No space left"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == {"step": 1}


def test_what_killed_writes_left_is_removed_next_time(tmp_path):
    dead = tmp_path / ".model.0123abcd"
    dead.mkdir()
    (dead / "weights").write_text("half")
    for name in (".result.json.tmp", "weights.safetensors.partial"):
        (tmp_path / name).write_text("half")
    with locked(tmp_path):
        assert not (tmp_path / ".result.json.tmp").exists()
        assert not (tmp_path / "weights.safetensors.partial").exists()
    with atomic_folder(tmp_path / "model") as living:
        assert not dead.exists()
        # Another process that makes the same folder meanwhile takes nobody's work for a leftover.
        with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model"):
            raise RuntimeError
        assert living.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model"]
