"""Files are there whole or not at all, and notice a changed byte."""

import json

import pytest

from foundation import files
from foundation.files import CorruptFileError, DiskFullError, atomic_folder, fingerprint, read_sealed, write_sealed


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
