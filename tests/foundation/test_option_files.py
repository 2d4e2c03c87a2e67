"""Options in a file: what a command makes of them, what is refused, and that what a command leaves repeats it."""

from pathlib import Path

import pytest

from foundation.command import leave_options, run_command
from foundation.option_files import OPTIONS_FILE, with_option_files, without_option, write_options

FILE = """
arguments = ["baseline", "top_p"]
tokens = 300_000
learning_rate = 7e-3
dry-run = true
data = ["one folder", "another"]
[model]
dtype = "float32"
qk-norm = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "options.toml"
    path.write_text(FILE)
    return path


def test_a_file_stands_for_its_options(file: Path) -> None:
    words = ["baseline", "top_p", "--tokens", "300000", "--learning-rate", "0.007", "--dry-run", "--data", "one folder"]
    words += ["another", "--model.dtype", "float32", "--model.no-qk-norm"]
    assert with_option_files(["compare", "--config", str(file)]) == ["compare", *words]
    assert with_option_files(["compare", f"--config={file}"]) == ["compare", *words]


def test_the_command_line_decides(file: Path) -> None:
    given = ["--tokens", "9", "--no-dry-run", "--data=x", "--model.qk-norm"]
    for words in (["--config", str(file), *given], [*given, "--config", str(file)]):
        left = [word for word in with_option_files(words) if word not in given]
        assert left == ["baseline", "top_p", "--learning-rate", "0.007", "--model.dtype", "float32"]


def test_arguments_stand_ahead_of_options_and_give_way_to_those_of_the_command_line(file: Path) -> None:
    # Behind an option that takes several values they would be some of these.
    first = with_option_files(["compare", "--data", "mine", "--config", str(file)])
    assert first[:5] == ["compare", "baseline", "top_p", "--data", "mine"]
    assert with_option_files(["compare", "relu", "--config", str(file)])[:3] == ["compare", "relu", "--tokens"]
    # A program of one command has no word for it; some have two.
    assert with_option_files(["--seeds", "2", "--config", str(file)])[:3] == ["baseline", "top_p", "--seeds"]
    words = ["scaling", "fit", "--config", str(file)]
    assert with_option_files(words, nested=("scaling",))[:4] == ["scaling", "fit", "baseline", "top_p"]


def test_an_option_is_taken_out_with_its_value() -> None:
    words = ["--processes", "2", "--data", "a", "b", "--processes=3", "--seed", "4"]
    assert without_option(words, "--processes") == ["--data", "a", "b", "--seed", "4"]


def test_a_command_below_another_leaves_its_options_without_both_names(tmp_path: Path) -> None:
    def run(words: list[str]) -> None:
        leave_options(tmp_path)

    words = ["scaling", "fit", "points.csv", "--law", "total"]
    run_command(lambda given: list(given or ()), run, words, nested=("scaling",))
    read = with_option_files(["scaling", "fit", "--config", str(tmp_path / OPTIONS_FILE)], nested=("scaling",))
    assert read == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens = ", "is no TOML"),
        ("tokens = [[1]]", "tokens = [[1]]"),
        ("when = 2026-01-01", "when = datetime.date"),
        ('arguments = "baseline"', "a list of words"),
    ],
)
def test_what_cannot_be_an_option_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        with_option_files(["--config", str(path)])
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_file_that_is_missing_ends_the_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--config", "nowhere.toml"], ["--config"]):
        with pytest.raises(SystemExit) as left:
            run_command(lambda given: given, print, words)
        assert str(left.value.code).startswith("error: --config")
        assert "\n" not in str(left.value.code)


@pytest.mark.parametrize(
    "words",
    [
        ["baseline", "top p", "--tokens", "5", "--data", "a", 'b"\\', "--model.dtype=float32", "--dry-run"],
        ["--no-branch", "--policy", '{"type": "TopP"}', "--learning-rate", "-1", "--seed", "007", "--label", "true"],
        [],
    ],
)
def test_what_is_left_repeats_the_command(tmp_path: Path, words: list[str]) -> None:
    write_options(tmp_path, words)
    read = with_option_files(["--config", str(tmp_path / OPTIONS_FILE)])
    assert read == [part for word in words for part in word.split("=", 1 if word.startswith("--") else 0)]


def test_a_command_leaves_the_options_that_it_was_given_by_line_and_file(file: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def run(words: list[str]) -> None:
        seen.append(words)
        leave_options(tmp_path / "left")

    run_command(lambda given: list(given or ()), run, ["compare", "--config", str(file), "--tokens", "9"])
    run_command(lambda given: list(given or ()), run, ["compare", "--config", str(tmp_path / "left" / OPTIONS_FILE)])
    assert seen[0] == seen[1]
    assert "--tokens" in seen[0]
