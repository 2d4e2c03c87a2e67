"""`make demo` on a folder with a trained model, and on one without."""

import shutil

import pytest

from demos.__main__ import Demo, main
from tests.demos.commands import COMMANDS, run

COMMANDS["demo"] = (Demo, main)


def test_it_shows_the_best_model_and_writes_a_page(varied_folder, tmp_path):
    shutil.copytree(varied_folder, tmp_path / "one" / "model")
    options = ("--runs", tmp_path, "--out", tmp_path / "shown", "--max-new-tokens", 12, "--budget", 3)
    for time in ("1", "2"):
        said = run("demo", *options)
        assert said.returncode == 0, said.stderr
        page = tmp_path / "shown" / time / "page.html"
        assert f"in a browser: {page.as_uri()}" in said.stdout
        assert "(budget 3)" in said.stdout
        assert page.is_file()


@pytest.mark.long
def test_without_a_model_it_trains_one(tmp_path):
    said = run("demo", "--runs", tmp_path, "--out", tmp_path / "shown", "--tokens", 20_000, "--max-new-tokens", 12)
    assert said.returncode == 0, said.stderr
    assert "training a small one on 20,000 tokens" in said.stdout
    assert "top_p, trunk seed 0, seed 0" in said.stdout
    assert "the Python standard library" in said.stdout
    assert (tmp_path / "shown" / "1" / "page.html").is_file()
