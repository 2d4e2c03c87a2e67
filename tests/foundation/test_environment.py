"""Where a number was made: a wrong answer is worse than none."""

import shutil
import subprocess

import pytest

from foundation import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one committed file, taken for ours."""
    folder = tmp_path / "ours"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("a")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "one")
    monkeypatch.setattr(environment, "ROOT", folder.resolve())
    return folder


def test_a_checkout_has_a_commit_and_says_whether_it_is_edited(checkout):
    assert len(environment.environment()["commit"]) == 40
    assert environment.environment()["uncommitted_changes"] is False
    clean = environment.short_commit()
    (checkout / "file").write_text("b")
    assert environment.environment()["uncommitted_changes"] is True
    assert environment.short_commit() == clean + "+"


def test_the_commit_of_a_repository_around_it_is_not_its_own(checkout, monkeypatch):
    unpacked = checkout / "vendor" / "lab"
    unpacked.mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", unpacked.resolve())
    found = environment.environment()
    assert found["commit"] is None
    assert found["uncommitted_changes"] is None
    assert environment.short_commit() == "unknown"


def test_without_git_nothing_is_claimed(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("git") is None
    found = environment.environment(data_hash="x")
    assert (found["commit"], found["uncommitted_changes"], found["data_hash"]) == (None, None, "x")


def test_a_repository_that_git_cannot_read_is_not_called_clean(checkout):
    shutil.rmtree(checkout / ".git" / "objects")
    assert environment.environment()["uncommitted_changes"] is None


def test_only_torchrun_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert environment.environment()["processes"] == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert environment.environment()["processes"] == 8
