"""The terminal demo as a person runs it: on a saved model, without colours, under a budget, recorded and replayed."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpus.tokenizer import Tokenizer
from demos.terminal import newest_model
from demos.terminal_view import SCALE, Palette, Summary
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
from routing.policies.zero_computation import ZeroComputationExperts
from routing.router import RouterConfig
from routing.trace import read_trace

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
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_numbers_budget_trace_and_replay(model_folder, tmp_path):
    trace = tmp_path / "trace"
    shown = run("--run", model_folder, "--budget", "2.5", "--max-new-tokens", "24", "--trace", trace)
    assert shown.returncode == 0, shown.stderr
    assert "number in brackets" in shown.stdout
    assert "budget 2.5" in shown.stdout
    assert "full attention" in shown.stdout
    text, experts_NL = read_generation(trace)
    assert 0 < len(text.tokens) <= 24
    assert len(set(experts_NL.mean(axis=1))) > 1, "under a budget the number varies by token"
    again = run("--replay", trace)
    assert again.stdout == shown.stdout
    # Once more into the same folder would mix two recordings.
    refused = run("--run", model_folder, "--trace", trace)
    assert refused.returncode == 1
    assert "holds a trace already" in refused.stderr


def test_as_trained_every_token_gets_the_same(model_folder):
    shown = run("--run", model_folder, "--max-new-tokens", "5", "--colours", "always")
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
        module="lm",
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("def main")
    assert "12 tokens" in shown.stderr


def test_generate_records_the_routing_of_every_token(model_folder, tmp_path):
    options = ("generate", "--run", model_folder, "--prompt", "def main", "--max-new-tokens", "12")
    shown = run(*options, "--trace", tmp_path / "trace", module="lm")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == run(*options, module="lm").stdout
    text, experts_NL = read_generation(tmp_path / "trace")
    assert "def main" + "".join(text.pieces) == shown.stdout.rstrip("\n")
    assert experts_NL.tolist() == [[4, 4]] * 12
    rows = read_trace(tmp_path / "trace")
    # Top-4 in two layers, for every token of the prompt and every generated one that was fed back; its weights sum to
    # one.
    assert len(rows.token) == 2 * 4 * (len(text.prompt) + 11)
    assert rows.weight.sum() == pytest.approx(len(rows.token) / 4, rel=1e-5)
    refused = run("--replay", tmp_path / "trace")
    assert "did not record" in refused.stderr


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
            record(step.token, "")
    experts_NL = read_generation(tmp_path)[1]
    assert experts_NL.tolist() == [list(step.experts) for step in steps]
    assert (experts_NL == 0).any()
    assert (experts_NL > 1).any()


def test_errors_are_one_line(tmp_path):
    for arguments in (["--run", tmp_path], ["--replay", tmp_path / "none"], ["--run", tmp_path, "--temperature", "-1"]):
        failed = run(*arguments)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr
    with pytest.raises(ValueError, match="make ablation"):
        newest_model(tmp_path)


def test_the_newest_model_whose_numbers_vary_is_preferred(tmp_path):
    policies = [DifficultyHead(target_mean=4.0, cap=8), TopK(k=4), ExpertChoice(k=4.0)]
    for age, policy in enumerate(policies):
        config = ModelConfig(n_layers=1, moe=MoEConfig(n_experts=16, d_expert=16, router=RouterConfig(policy=policy)))
        folder = tmp_path / str(age) / "model"
        save_pretrained(folder, LanguageModel(config).init_weights(0))
        os.utime(folder / "weights.safetensors", (age, age))
    # What cannot be read any more is no reason to fail, and nothing to prefer.
    config_file = tmp_path / "2" / "model" / "config.json"
    assert newest_model(tmp_path) == tmp_path / "0" / "model"
    config_file.write_text('{"lower_moe": null}')
    assert newest_model(tmp_path) == tmp_path / "0" / "model"
    shutil.rmtree(tmp_path / "0")
    assert newest_model(tmp_path) == config_file.parent


@given(st.floats(0, 80), st.floats(0, 40), st.floats(0, 40))
def test_the_scale_is_monotone_and_bounded(experts, low, width):
    palette = Palette(low, low + width, colours=True)
    assert 0 <= palette.step(experts) <= len(SCALE) - 1
    assert palette.step(experts) <= palette.step(experts + 1)


def test_backgrounds_end_at_line_ends():
    painted = Palette(1, 5, colours=True).paint("a\nb", 3)
    assert "a\x1b[0m\n" in painted
    assert painted.endswith("\x1b[0m")


@pytest.mark.parametrize("colours", [True, False])
def test_control_sequences_of_the_text_are_shown(colours):
    painted = Palette(1, 5, colours=colours).paint("a\x1b[2Jb\r", 3)
    assert "a\\x1b[2Jb\\x0d" in painted


def test_summary_says_what_the_cache_saves():
    text = str(Summary(mean_experts=6.0, budget=None, milliseconds=2.0, cache_bytes=250, full_attention_bytes=1000))
    assert "75.0% saved" in text
    assert "as trained" in text
