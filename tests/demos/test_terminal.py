"""The terminal demo as a person runs it: on a saved model, without colours, under a budget, recorded and replayed."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.tokenizer import Tokenizer
from demos.terminal import newest_model, replay
from demos.terminal_view import SCALE, Palette, Summary
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.router import RouterConfig
from routing.top_k import TopK

TEXT = "def main(argv):\n    for name in argv:\n        print(name)\n\n" * 60


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tokenizer = Tokenizer.train([TEXT], 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_layers=2,
        layer_plan="SF",
        moe=MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=TopK(k=4))),
    )
    model = LanguageModel(config).init_weights(0)
    torch.nn.init.normal_(model.head_VD, std=0.3, generator=torch.Generator().manual_seed(1))
    save_pretrained(folder, model, torch.tensor(tokenizer.encode(TEXT)[:512]).view(4, 128))
    tokenizer.save(folder / "tokenizer.model")
    return folder


def run(*arguments, module="demos.terminal"):
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_numbers_budget_trace_and_replay(model_folder, tmp_path):
    trace = tmp_path / "trace.json"
    shown = run("--run", model_folder, "--budget", "2.5", "--max-new-tokens", "24", "--trace", trace)
    assert shown.returncode == 0, shown.stderr
    assert "number in brackets" in shown.stdout
    assert "budget 2.5" in shown.stdout
    assert "full attention" in shown.stdout
    events = json.loads(trace.read_text())["events"]
    generated = [event for event in events if "text" in event]
    assert 0 < len(generated) <= 24
    assert len({event["experts"] for event in generated}) > 1, "under a budget the number varies by token"
    again = run("--replay", trace)
    assert again.stdout == shown.stdout


def test_as_trained_every_token_gets_the_same(model_folder):
    shown = run("--run", model_folder, "--max-new-tokens", "5", "--colours", "always")
    assert shown.returncode == 0, shown.stderr
    assert "mean experts 4.00 (as trained)" in shown.stdout
    assert "\x1b[48;5;" in shown.stdout


def test_generate_streams_text(model_folder):
    shown = run("generate", "--run", model_folder.parent, "--prompt", "def main", "--max-new-tokens", "12", "--temperature", "0", module="lm")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("def main")
    assert "12 tokens" in shown.stderr


def test_errors_are_one_line(tmp_path):
    for arguments in (["--run", tmp_path], ["--replay", tmp_path / "none.json"], ["--run", tmp_path, "--temperature", "-1"]):
        failed = run(*arguments)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr
    with pytest.raises(ValueError, match="make ablation"):
        newest_model(tmp_path)
    (tmp_path / "old.json").write_text('{"version": 0, "events": []}')
    with pytest.raises(ValueError, match="trace version 0"):
        list(replay(tmp_path / "old.json"))


@given(st.floats(0, 80), st.floats(0, 40), st.floats(0, 40))
def test_the_scale_is_monotone_and_bounded(experts, low, width):
    palette = Palette(low, low + width, colours=True)
    assert 0 <= palette.step(experts) <= len(SCALE) - 1
    assert palette.step(experts) <= palette.step(experts + 1)


def test_backgrounds_end_at_line_ends():
    painted = Palette(1, 5, colours=True).paint("a\nb", 3)
    assert "a\x1b[0m\n" in painted
    assert painted.endswith("\x1b[0m")


def test_summary_says_what_the_cache_saves():
    text = str(Summary(mean_experts=6.0, budget=None, milliseconds=2.0, cache_bytes=250, full_attention_bytes=1000))
    assert "75.0% saved" in text
    assert "as trained" in text
