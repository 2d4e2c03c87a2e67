"""The terminal demo as a person runs it: on a saved model, without colours, under a budget, recorded and replayed."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demos.live import LiveModel
from demos.runs import best_model, shown_run
from demos.side import Side
from demos.terminal_view import ENDS, SCALE, Palette, Pane, Summary, cells, frame, shown, wrapped
from lm.budget import set_budget
from lm.config import ModelConfig
from lm.generate import generate
from lm.generation_trace import read_generation, traced_generation
from lm.model import LanguageModel
from lm.pretrained import load_calibration_tokens, load_pretrained, save_pretrained
from lm.sampling import SamplingConfig
from moe.config import MoEConfig
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.expert_choice import ExpertChoice
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import RouterConfig
from routing.trace import read_trace
from tests.demos.commands import run

TEXT = "def main(argv):\n    for name in argv:\n        print(name)\n\n" * 60


def test_numbers_budget_trace_and_replay(model_folder, tmp_path):
    trace = tmp_path / "trace"
    shown = run("terminal", "--run", model_folder, "--budget", "2.5", "--max-new-tokens", "24", "--trace", trace)
    assert shown.returncode == 0, shown.stderr
    assert "number in brackets" in shown.stdout
    assert "budget 2.5" in shown.stdout
    assert "full attention" in shown.stdout
    assert "bits per byte" in shown.stdout
    assert ENDS["length"] in shown.stdout
    text, experts_NL = read_generation(trace)
    assert 0 < len(text.tokens) <= 24
    assert len(set(experts_NL.mean(axis=1))) > 1, "under a budget the number varies by token"
    again = run("terminal", "--replay", trace)
    assert again.stdout == shown.stdout
    # Once more into the same folder would mix two recordings.
    refused = run("terminal", "--run", model_folder, "--trace", trace)
    assert refused.returncode == 1
    assert "holds a trace already" in refused.stderr


def test_as_trained_every_token_gets_the_same(model_folder):
    shown = run("terminal", "--run", model_folder, "--max-new-tokens", "5", "--colours", "always")
    assert shown.returncode == 0, shown.stderr
    assert "mean experts 4.00 (as trained)" in shown.stdout
    assert "\x1b[48;5;" in shown.stdout


def test_generate_streams_text(model_folder):
    shown = run(
        "generate",
        "--run",
        model_folder.parent,
        "--prompt",
        "def main",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("def main")
    assert "12 tokens" in shown.stderr


def test_generate_records_the_routing_of_every_token(model_folder, tmp_path):
    options = ("--run", model_folder, "--prompt", "def main", "--max-new-tokens", "12")
    shown = run("generate", *options, "--trace", tmp_path / "trace")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == run("generate", *options).stdout
    text, experts_NL = read_generation(tmp_path / "trace")
    assert shown.stdout.startswith("def main" + "".join(text.pieces))
    assert experts_NL.tolist() == [[4, 4]] * 12
    rows = read_trace(tmp_path / "trace")
    # Top-4 in two layers, for every token of the prompt and every generated one that was fed back; its weights sum to
    # one.
    assert len(rows.token) == 2 * 4 * (len(text.prompt) + 11)
    assert rows.weight.sum() == pytest.approx(len(rows.token) / 4, rel=1e-5)
    # The demo shows what another command has recorded.
    replayed = run("terminal", "--replay", tmp_path / "trace")
    assert "mean experts 4.00 (as trained)" in replayed.stdout
    assert "def main" in replayed.stdout


def test_counts_on_record_are_those_of_the_forward_that_predicted_the_token(model_folder, tmp_path):
    """Also where a layer gives a token no expert at all, and so leaves no row of it."""
    model = load_pretrained(model_folder, "cpu")
    # Tokens without an expert are returned themselves, so that the model needs no shared one.
    model.set_policy(ZeroComputationExperts(k=8, n_null=8, target_mean=1.0))
    set_budget(model, 1.0, load_calibration_tokens(model_folder))
    prompt = [1, 5, 9]
    with traced_generation(model, tmp_path, prompt=prompt) as record:
        steps = list(generate(model, prompt, max_new_tokens=40, sampling=SamplingConfig()))
        for step in steps:
            record.add(step, "")
    experts_NL = read_generation(tmp_path)[1]
    assert experts_NL.tolist() == [list(step.experts) for step in steps]
    assert (experts_NL == 0).any()
    assert (experts_NL > 1).any()


def test_errors_are_one_line(tmp_path):
    for arguments in (["--run", tmp_path], ["--replay", tmp_path / "none"], ["--run", tmp_path, "--temperature", "-1"]):
        failed = run("terminal", *arguments)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr
    with pytest.raises(ValueError, match="make ablation"):
        best_model(tmp_path)


def test_without_finished_runs_the_newest_model_whose_numbers_vary_is_preferred(tmp_path):
    policies = [DifficultyHead(target_mean=4.0, cap=8), TopK(k=4), ExpertChoice(k=4.0)]
    for age, policy in enumerate(policies):
        config = ModelConfig(n_layers=1, moe=MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=policy)))
        folder = tmp_path / str(age) / "model"
        save_pretrained(folder, LanguageModel(config).init_weights(0))
        os.utime(folder / "weights.safetensors", (age, age))
    # What cannot be read any more is no reason to fail, and nothing to prefer.
    config_file = tmp_path / "2" / "model" / "config.json"
    assert best_model(tmp_path) == tmp_path / "0" / "model"
    config_file.write_text('{"lower_moe": null}')
    assert best_model(tmp_path) == tmp_path / "0" / "model"
    shutil.rmtree(tmp_path / "0")
    assert best_model(tmp_path) == config_file.parent


def test_of_finished_runs_the_best_on_the_newest_text_is_shown(tmp_path):
    runs = [("old_text", 1.0, "a", 1), ("worse", 2.2, "b", 2), ("best", 2.1, "b", 3), ("newest", 2.3, "b", 4)]
    for name, score, text, age in runs:
        folder = tmp_path / "branches" / name
        config = ModelConfig(
            n_layers=1, moe=MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=TopP(target_mean=4, cap=8)))
        )
        save_pretrained(folder / "model", LanguageModel(config).init_weights(0))
        os.utime(folder / "model" / "weights.safetensors", (age, age))
        budgets = [{"mean_experts": 2.0, "bits_per_byte": 3.0}]
        result = {"method": name, "bits_per_byte": score, "trunk_seed": 0, "branch_seed": 1, "budgets": budgets}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "environment.json").write_text(json.dumps({"data_hash": text}))
        corpus = {"train_tokens": 5, "train_bytes": 2e6, "valid_tokens": 3, "valid_bytes": 9}
        (folder / "config.json").write_text(json.dumps({"trunk": {"corpus": corpus}}))
    prepared = tmp_path / "corpus" / "0123"
    prepared.mkdir(parents=True)
    manifest = {"config": {"data": ["books"]}, "train": {"tokens": 5}, "valid": {"tokens": 3}}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    found = shown_run(best_model(tmp_path))
    assert found.name == f"best, trunk seed 0, seed 1 ({tmp_path / 'branches' / 'best'})"
    assert str(found).endswith("books (2.0 MB) · 2.1000 bits per byte")
    assert found.frontier == ((2.0, 3.0),)


@pytest.mark.parametrize("kind", ["static", "budgets"])
def test_side_by_side(kind, varied_folder):
    shown = run(
        "terminal", "--run", varied_folder, "--side-by-side", kind, "--budgets", "2", "8", "--max-new-tokens", "30"
    )
    assert shown.returncode == 0, shown.stderr
    assert "29 pairs in turn" in shown.stdout
    assert "times as long" in shown.stdout
    if kind == "static":
        assert "4 experts for every token" in shown.stdout
        assert "mean experts 4.00 (budget 4, the same for all)" in shown.stdout
        assert "(budget 4)" in shown.stdout
    else:
        assert "(budget 2)" in shown.stdout
        assert "(budget 8)" in shown.stdout


def test_the_end_of_a_document_is_said(varied_folder):
    live, greedy = LiveModel(varied_folder), SamplingConfig(temperature=0)
    tokens = [step.token for step in live.stream(live.prompt("def"), max_new_tokens=9, sampling=greedy)]
    live.tokenizer.boundary_id = tokens[6]
    # The prompt begins with the token that now ends a text.
    side = Side(live, "def", title="", max_new_tokens=9, sampling=greedy)
    side._stream = live.stream([1, *live.prompt("def")[1:]], max_new_tokens=9, sampling=greedy)
    while side.advance():
        pass
    assert len(side.measured.means) == tokens.index(tokens[6])
    assert side.pane.note == "end of the document: the model closed it"


def test_a_budget_that_is_set_again_is_the_same(varied_folder):
    live = LiveModel(varied_folder)

    def thresholds():
        return [float(router.policy.budget.threshold) for router in live.model.routers()]

    trained = thresholds()
    live.set_budget(3)
    three = thresholds()
    live.set_budget(9)
    assert all(nine > few for nine, few in zip(thresholds(), three))
    live.set_budget(3)
    assert thresholds() == three
    with pytest.raises(ValueError, match="at most 12"):
        live.set_budget(12.5)
    assert thresholds() == three
    live.set_budget(None)
    assert thresholds() == trained


def test_twins_share_weights_and_not_budgets(model_folder):
    live = LiveModel(model_folder)
    other = live.twin(static=True)
    live.set_budget(2.5)
    other.set_budget(7)
    assert live.model.head_VD is other.model.head_VD
    prompt, greedy = live.prompt("def main"), SamplingConfig(temperature=0)
    fixed = [step.experts for step in other.stream(prompt, max_new_tokens=5, sampling=greedy)]
    varied = [step.experts for step in live.stream(prompt, max_new_tokens=20, sampling=greedy)]
    assert set(fixed) == {(7, 7)}
    assert len(set(varied)) > 1
    live.set_budget(None)
    assert {step.experts for step in live.stream(prompt, max_new_tokens=3, sampling=greedy)} == {(4, 4)}


def test_a_budget_that_cannot_be_held_is_one_line(varied_folder):
    failed = run("terminal", "--run", varied_folder, "--budget", "13")
    assert failed.stderr == "error: budget: 13 experts per token; legal: above 0, at most 12\n"
    failed = run("terminal", "--run", varied_folder, "--side-by-side", "static", "--budget", "2.5")
    assert "legal: a whole number" in failed.stderr


class Terminal:
    """The demo on a terminal of its own."""

    def __init__(self, *arguments, columns=100, lines=30):
        self.end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(lines)}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demos.terminal", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def until(self, text, seconds=60):
        """Reads until the screen holds a text; what came since the last time."""
        came, until = "", time.monotonic() + seconds
        while text not in came:
            assert select.select([self.end], [], [], max(until - time.monotonic(), 0))[0], (text, self.seen[-2000:])
            try:
                read = os.read(self.end, 65536).decode("utf-8", "replace")
            except OSError:
                read = ""
            assert read, (text, self.seen[-2000:])
            came, self.seen = came + read, self.seen + read
        return came

    def press(self, keys):
        os.write(self.end, keys.encode())


def test_keys_change_the_budget_while_the_text_grows(varied_folder, forked):
    terminal = Terminal("--run", varied_folder, "--temperature", "0", "--max-new-tokens", "9999", "--pace", "50")
    terminal.until("tokens | mean experts")
    terminal.press("+")
    terminal.until("from here on: 5 experts in the mean")
    terminal.press("\x1b[B")
    terminal.until("from here on: 4 experts in the mean")
    terminal.press("-")
    terminal.until("(budget 3)")
    terminal.press("t")
    terminal.until("(as trained)")
    terminal.press(" ")
    terminal.until("(paused)")
    terminal.press("q")
    left = terminal.until("stopped here")
    assert terminal.process.wait(20) == 0
    # The screen of before comes back, and the text stays on it.
    assert "\x1b[?1049l" in left
    assert "layer 0" in terminal.seen


@pytest.mark.slow
def test_ctrl_c_gives_the_terminal_back(varied_folder, forked):
    terminal = Terminal(
        "--run", varied_folder, "--temperature", "0", "--max-new-tokens", "9999", "--side-by-side", "static"
    )
    terminal.until("pairs in turn")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.until("\x1b[?1049l")
    assert terminal.process.wait(20) == 130


@given(st.floats(0, 80), st.floats(1, 40))
def test_the_scale_is_fixed_monotone_and_bounded(experts, cap):
    palette = Palette(cap, colours=True)
    assert 0 <= palette.step(experts) <= len(SCALE) - 1
    assert palette.step(experts) <= palette.step(experts + 1)
    assert palette.step(0) == 0
    assert palette.step(cap) == len(SCALE) - 1


def test_backgrounds_end_at_line_ends():
    painted = Palette(5, colours=True).paint("a\nb", 3)
    assert "a\x1b[0m\n" in painted
    assert painted.endswith("\x1b[0m")


@pytest.mark.parametrize("colours", [True, False])
def test_control_sequences_of_the_text_are_shown(colours):
    painted = Palette(5, colours=colours).paint("a\x1b[2Jb\r", 3)
    assert "a\\x1b[2Jb\\x0d" in painted


def test_summary_says_what_the_cache_saves():
    text = str(summary())
    assert "75.0% saved" in text
    assert "as trained" in text


def summary():
    return Summary(
        tokens=3,
        mean_experts=6.0,
        budget=None,
        bits_per_byte=1.5,
        milliseconds=2.0,
        cache_bytes=250,
        full_attention_bytes=1000,
    )


def test_sparks_stand_on_the_fixed_scale():
    palette = Palette(8, colours=True)
    assert palette.spark([0, 1, 4, 8, 9]) == "·▁▄██"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=9), st.integers(0, 9)), max_size=12), st.integers(8, 40))
def test_wrapped_lines_fit_and_hold_the_text(runs, width):
    lines = wrapped(runs, width)
    assert all(sum(cells(text) for text, _ in line) <= width for line in lines)

    def letters(text):
        return "".join(text.split())

    from foundation.console import escaped

    assert letters("".join(text for line in lines for text, _ in line)) == letters(
        escaped("".join(text for text, _ in runs)).replace("\t", " ")
    )


def test_words_stay_whole():
    lines = wrapped([("some wo", 1), ("rds wr", 2), ("apped", 3)], 10)
    assert ["".join(text for text, _ in line).strip() for line in lines] == ["some words", "wrapped"]
    assert lines[1][-2:] == [("wr", 2), ("apped", 3)]
    # What is written without spaces may be broken anywhere, and a word longer than a line must be.
    assert len(wrapped([("字" * 12, 1)], 10)) == 3
    assert len(wrapped([("a" * 25, 1)], 10)) == 3


def test_half_characters_are_never_shown():
    assert shown("a\ufffdb\ufffd") == "ab"


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("panes", [1, 2])
def test_a_frame_fits_its_terminal(columns, panes):
    pane = Pane("title", [("def f(x):\n    return 字 * x\n" * 30, 3.0)], {0: [1, 5, 8] * 40, 1: [2] * 120}, summary())
    lines = frame([pane] * panes, Palette(8, colours=True), ["run", "legend"], "keys", (columns, 24))
    assert len(lines) <= 24
    assert all(cells(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= columns for line in lines)
    assert any("▁" in line for line in lines)
