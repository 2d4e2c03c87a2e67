"""Malformed command lines of every command: no traceback, no name from inside a parser, and nothing that makes no sense
is run."""

import functools
import importlib
import json
import re
import shutil
import sys

import pytest
import tyro

from demos import browser, serve, terminal
from foundation.command import run_command
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig

# Names that only a parser knows.
INTERNAL = ("tyro", "dummy", "argparse", "_parse", "__main__")
DEMOS = {
    "demos": (terminal.DemoConfig, terminal.main),
    "demos.browser": (browser.BrowserConfig, browser.main),
    "demos.serve": (serve.ServeConfig, serve.main),
}


def run(*words):
    """Runs `python -m package ...` in this process."""
    package, *arguments = words
    if package in DEMOS:
        config, main = DEMOS[package]
        run_command(lambda given: tyro.cli(config, prog=package, args=given), main, arguments)
        return
    module = importlib.import_module("ablations.cli" if package == "ablations" else f"{package}.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [package, *arguments])
        module.main()


def refusal(capsys, *words):
    """What a command says that refuses its command line; everything but SystemExit fails the test."""
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    said = capsys.readouterr().err
    if isinstance(stopped.value.code, str):
        said += stopped.value.code
    else:
        assert stopped.value.code in (1, 2), (words, said)
    assert not any(name in said for name in (*INTERNAL, "Traceback")), said
    return said


TINY_RUN = ("--out", "{out}", "--data", "{text}", "--vocab-size", "300", "--d-model", "16", "--valid-share", "0.06")
TINY_COMPARE = ("top_p", "--out", "{out}", "--data", "{text}", "--vocab-size", "300", "--d-model", "16", "--dry-run")
NONSENSE = {
    "staged_training run": {
        "--save-every": ("0", "-1", "nan"),
        "--log-every": ("0", "-3"),
        "--track": ("paper",),
        "--tokens": ("0", "-1", "1e400", "nan", "1" + "0" * 23, "100"),
        "--learning-rate": ("0", "-1", "nan", "inf", "1e400"),
        "--batch-size": ("0", "100000000"),
        "--seq-len": ("-1", "100000000"),
        "--freeze": ("1", "nan", "-0.1"),
        "--trunk-share": ("-0.1", "1", "nan"),
        "--clip": ("0", "inf"),
        "--muon-momentum": ("1", "-1", "nan"),
        "--optimizer": ("sgd",),
        "--d-model": ("0", "-1", "1" + "0" * 23),
        "--layer-plan": ("", "X", "R"),
        "--balance-coefficient": ("nan", "inf", "-1"),
        "--z-coefficient": ("nan",),
        "--n-experts": ("0",),
        "--rope-base": ("nan", "inf", "0"),
        "--valid-share": ("nan", "-1", "0", "2"),
        "--valid-documents": ("0", "-1", "some"),
        "--valid-characters": ("-1", "some"),
        "--shard-tokens": ("0", "-1"),
        "--trunk-seed": ("-1", "x"),
    },
    "staged_training parallel": {
        "--expert-parallel": ("-1", "3"),
        "--processes": ("0", "x"),
        "--seed": ("-1",),
        "--optimizer": ("sgd",),
        "--policy": ("{", "[]", "3", '"TopP"', '{"type": "TopK", "k": "2"}', '{"type": "TopK", "k": 2.5}'),
    },
    "staged_training sweep": {
        "--optimizers": ("sgd",),
        "--learning-rates": ("0", "-1", "nan", "inf"),
        "--tokens": ("0", "100"),
        "--token-budgets": ("0", "100"),
        "--seeds": ("0", "-1"),
        "--csv": ("/dev/null/x", "/tmp"),
        "--anneal": ("stop",),
        "--trunk-merge-share": ("1", "-1", "nan"),
    },
    "staged_training adapt": {
        "--run": ("/nowhere", "/dev/null"),
        "--method": ("top_k",),
        "--mean": ("-1", "nan", "inf"),
        "--tokens": ("0", "-1"),
        "--batch-size": ("0",),
        "--learning-rate": ("0", "nan"),
        "--router-share": ("2", "-1", "nan"),
        "--decay-share": ("0.99", "nan"),
        "--ramp-share": ("1.5",),
        "--distill-share": ("1.1",),
        "--temperature": ("0", "inf"),
        "--then": ("attention",),
        "--first-batch": ("-1",),
        "--save-every": ("0",),
        "--optimizer.clip": ("0",),
    },
    "ablations problems": {"--out": ("/dev/null/x", "/tmp"), "--count": ("0", "-1", "nan")},
    "ablations compare": {
        "--seeds": ("0", "-1", "nan"),
        "--trunk-seeds": ("0",),
        "--budget-batches": ("0",),
        "--tokens": ("0", "1" + "0" * 23),
        "--k": ("0", "81", "-1"),
        "--learning-rate": ("nan",),
        "--optimizer": ("sgd",),
        "--log-every": ("0",),
        "--dtype": ("int8",),
    },
    "ablations budgets": {"--last-steps": ("0", "-1", "nan")},
    "ablations difficulty": {
        "--minutes": ("0", "-1", "nan", "inf"),
        "--optimizer": ("sgd",),
        "--reference-share": ("0", "nan", "2"),
        "--static": ("0", "-1"),
        "--forced": ("1", "3 2"),
        "--resamples": ("0",),
        "--synthetic-documents": ("1",),
    },
    "ablations counterfactual": {
        "--run": ("/nowhere", "/dev/null"),
        "--mean": ("nan", "-1", "inf"),
        "--forced": ("1", "3 2", "0 2"),
        "--documents": ("0", "-1"),
        "--window": ("0", "1"),
        "--resamples": ("0",),
        "--out": ("/dev/null/x", "/dev/null"),
    },
    "ablations pairs": {"--run": ("/nowhere", "/dev/null")},
    "ablations frontier": {
        "--run": ("/nowhere", "/dev/null"),
        "--budgets": ("0", "-1", "nan"),
        "--sequences": ("0",),
        "--repeats": ("0",),
        "--decode": ("0", "2"),
        "--out": ("/dev/null/x", "/dev/null"),
    },
    "ablations agreement": {
        "--form": ("medium",),
        "--arms": ("static_3", "top_p"),
        "--settings": ("fork85",),
        "--seeds": ("1", "-1", "nan"),
        "--trunk-seeds": ("0", "4"),
        "--tokens": ("0", "1" + "0" * 23, "100"),
        "--resamples": ("0",),
        "--budget-batches": ("0",),
        "--learning-rate": ("0", "nan"),
        "--head-dim": ("7",),
    },
    "ablations recall": {
        "--form": ("medium",),
        "--plans": ("CX", "CR"),
        "--widths": ("0", "33"),
        "--rates": ("0", "nan"),
        "--seeds": ("0",),
        "--steps": ("0",),
        "--vocab-size": ("8", "32"),
        "--window": ("0",),
        "--rotary-fraction": ("2",),
        "--jobs": ("-1",),
    },
    "ablations report": {"": ("/nowhere", "/dev/null")},
    "ablations scaling fit": {
        "--law": ("totl",),
        "--drop-highest": ("-1",),
        "--delta": ("0", "nan"),
        "--resamples": ("0",),
        "--out": ("/dev/null",),
    },
    "ablations scaling curves": {"--law": ("relax",), "--delta": ("0",), "--warmup": ("-1",), "--out": ("/dev/null",)},
    "ablations scaling predict": {
        "--targets": ("3B", "3B=nan"),
        "--multiples": ("0", "nan"),
        "--rows": ("1",),
        "--floor": ("-1",),
        "--out": ("/dev/null",),
    },
    "ablations scaling compare": {"--at": ("0", "nan"), "--draws": ("1",), "--baseline": ("top_p",)},
    "ablations scaling ladder": {
        "--law": ("totl",),
        "--methods": ("top_q",),
        "--widths": ("0", "20"),
        "--held-out": ("-1", "99"),
        "--token-budgets": ("0", "nan"),
        "--learning-rate": ("0", "nan"),
        "--phase": ("some",),
    },
    "ablations scaling plan": {"--flops": ("0", "nan", "-1"), "--seconds": ("inf",)},
    "ablations scaling noise": {"--rows": ("0", "20"), "--small": ("0", "nan"), "--csv": ("/dev/null/x",)},
    "ablations scaling transfer": {
        "--widths": ("0", "20"),
        "--learning-rates": ("0", "nan"),
        "--optimizer": ("adam",),
        "--expert-counts": ("0", "2"),
        "--seeds": ("-1",),
    },
    "corpus prepare": {"--vocab-size": ("-1", "nan"), "--root": ("/dev/null/x",), "--data": ("/nowhere", "/dev/null")},
    "corpus refine": {
        "--data": ("/nowhere", "/dev/null"),
        "--workers": ("0", "-1", "nan"),
        "--cluster-limit": ("0", "nan", "inf"),
        "--shard-mb": ("0", "-1", "nan"),
        "--languages": ("fr",),
        "--without": ("minhash",),
        "--trusted": ("/nowhere",),
        "--block-list": ("/nowhere",),
        "--out": ("/dev/null/x", "/dev/null"),
    },
    "corpus dirt": {"--data": ("/nowhere",), "--each": ("0", "nan"), "--out": ("/dev/null/x",)},
    "corpus facts": {
        "--documents": ("0", "nan"),
        "--words": ("1", "999"),
        "--easy-share": ("2", "nan"),
        "--out": ("/dev/null/x",),
    },
    "corpus questions": {
        "--data": ("/nowhere", "/dev/null"),
        "--form": ("riddle",),
        "--choices": ("1", "nan"),
        "--questions": ("0",),
        "--out": ("/dev/null/x",),
    },
    "corpus dots": {
        "--documents": ("0", "nan"),
        "--easy-share": ("-1", "2", "nan"),
        "--hard-dots": ("0", "9"),
        "--out": ("/dev/null/x",),
    },
    "corpus tokenizers": {
        "--data": ("/nowhere",),
        "--vocab-sizes": ("0", "260", "nan"),
        "--files": ("/nowhere.json", "/nowhere"),
        "--csv": ("/dev/null/x",),
    },
    "corpus show": {"": ("/nowhere", "/dev/null")},
    "lm generate": {
        "--temperature": ("nan", "inf", "-1", "1e400", "1e-40"),
        "--top-p": ("0", "nan", "2"),
        "--top-k": ("-1", "nan"),
        "--min-p": ("-1", "nan", "2"),
        "--repetition-penalty": ("0", "nan", "inf", "-1"),
        "--stop": ("",),
        "--max-new-tokens": ("-1", "1" + "0" * 23, "x"),
        "--seed": ("1" + "0" * 23, "nan"),
        "--run": ("/nowhere", "/dev/null"),
        "--trace": ("/dev/null/x", "/dev/null"),
    },
    "lm evaluate": {
        "--run": ("/nowhere", "/dev/null"),
        "--window": ("0", "-1", "nan"),
        "--stride": ("0", "1000"),
        "--batch-size": ("0",),
        "--resamples": ("0",),
        "--experts": ("nan", "-1"),
        "--csv": ("/dev/null/x", "/tmp"),
    },
    "lm bench": {
        "--batch-size": ("0", "-1", "1" + "0" * 23),
        "--seq-len": ("0",),
        "--decode-tokens": ("0", "2"),
        "--repeats": ("0",),
        "--threads": ("-1",),
        "--experts": ("0", "99"),
        "--csv": ("/dev/null/x", "/proc/x", "/tmp"),
        "--d-model": ("0",),
    },
    "lm cache": {
        "--layer-plan": ("X", "R", "SSXF"),
        "--length": ("0", "-1", "64x", "nan", "1" + "0" * 23),
        "--n-layers": ("-1", "nan"),
        "--batch-size": ("0", "-1"),
        "--dtype": ("int8",),
        "--window": ("0",),
        "--latent-dim": ("0",),
        "--conv-width": ("1", "9"),
        "--run": ("/nowhere", "/dev/null"),
        "--csv": ("/dev/null/x", "/tmp"),
        "--plot": ("/dev/null/x", "/tmp", "x.txt"),
    },
    "lm recall": {
        "--run": ("/nowhere", "/dev/null"),
        "--lengths": ("0", "nan", "20"),
        "--depths": ("2", "nan", "-1"),
        "--choices": ("1", "10000"),
        "--needles": ("0",),
        "--documents": ("0",),
        "--trained-length": ("0",),
        "--out": ("/dev/null/x", "/dev/null"),
    },
    "lm eval": {
        "--run": ("/nowhere", "/dev/null"),
        "--task-folder": ("/nowhere",),
        "--limit": ("0", "nan"),
        "--fewshot": ("-1",),
        "--batch-size": ("0",),
        "--experts": ("nan", "-1"),
        "--csv": ("/dev/null/x",),
    },
    "lm gguf": {"--type": ("q3",)},
    "lm import": {"--dtype": ("int8",), "": ("/nowhere",)},
    "lm export": {"--experts": ("0", "nan"), "--shard-bytes": ("0",), "--like": ("/nowhere",)},
    "lm parity": {"--families": ("llama",), "--seed": ("x",), "--csv": ("/dev/null/x",)},
    "moe bench": {
        "--tokens": ("0", "-1", "nan", "1" + "0" * 23),
        "--k": ("0", "99"),
        "--load": ("nan", "inf", "0"),
        "--repeats": ("0",),
        "--threads": ("0",),
        "--csv": ("/dev/null/x", "/tmp"),
    },
    "triton_kernels inspect": {"--arch": ("70", "x"), "--op": ("nothing",), "--csv": ("/dev/null/x", "/tmp")},
    "triton_kernels bench": {"--repeats": ("0",), "--csv": ("/dev/null/x",), "--plot": ("/dev/null/x",)},
    "triton_kernels gpu-check": {"--minutes": ("nan", "-1"), "--folder": ("/dev/null/x",)},
    "staged_training diagnostics": {"": ("/nowhere", "/dev/null")},
    "demos": {
        "--max-new-tokens": ("0", "-1"),
        "--budget": ("nan", "-1", "inf"),
        "--temperature": ("inf",),
        "--run": ("/nowhere",),
        "--replay": ("/nowhere", "/dev/null"),
        "--trace": ("/dev/null",),
        "--colours": ("red",),
        "--side-by-side": ("both",),
        "--pace": ("0", "nan"),
    },
    "demos.browser": {"": ("/nowhere", "/dev/null")},
    "demos.serve": {"--port": ("-1", "70000", "x"), "--run": ("/nowhere",)},
}
REST = {
    "corpus refine": ("--data", "{text}", "--out", "{out}"),
    "corpus tokenizers": ("--data", "{text}"),
    "corpus dirt": ("--data", "{text}", "--out", "{out}.jsonl"),
    "corpus facts": ("--out", "{out}.jsonl"),
    "corpus questions": ("--data", "{text}", "--out", "{out}.jsonl"),
    "corpus dots": ("--out", "{out}.jsonl"),
    "staged_training run": (*TINY_RUN, "--dry-run"),
    "staged_training parallel": TINY_RUN,
    "staged_training sweep": TINY_RUN,
    "staged_training adapt": ("--run", "/nowhere", "--data", "{text}"),
    "ablations problems": ("--out", "{out}.jsonl"),
    "ablations compare": TINY_COMPARE,
    "ablations budgets": TINY_COMPARE,
    "ablations agreement": TINY_COMPARE[1:],
    "lm generate": ("--run", "/nowhere"),
    "ablations scaling fit": ("/nowhere",),
    "ablations scaling curves": ("/nowhere",),
    "ablations scaling predict": ("/nowhere",),
    "ablations scaling compare": ("top_p", "/nowhere"),
    "ablations scaling ladder": TINY_COMPARE[1:],
    "ablations scaling plan": ("/nowhere",),
    "ablations scaling noise": ("/nowhere",),
    "ablations scaling transfer": ("--out", "{out}", "--data", "{text}", "--vocab-size", "300", "--dry-run"),
    "lm evaluate": ("--run", "/nowhere", "--data", "{text}"),
    "lm recall": ("--run", "/nowhere"),
    "lm eval": ("--run", "/nowhere", "--tasks", "arithmetic"),
    "lm gguf": ("/nowhere", "{out}.jsonl"),
    "lm import": ("{out}",),
    "lm export": ("/nowhere", "{out}"),
    "ablations counterfactual": ("--run", "/nowhere", "--out", "{out}"),
    "ablations pairs": ("--against", "/nowhere"),
    "ablations frontier": ("--run", "/nowhere", "--out", "{out}"),
    "ablations difficulty": ("--out", "{out}", "--data", "{text}", "--phase", "analyse"),
}
CASES = [
    (command, option, value) for command, options in NONSENSE.items() for option in options for value in options[option]
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("lines")
    (root / "text").mkdir()
    for number in range(30):
        (root / "text" / f"{number}.txt").write_text(f"document {number}: " + "the same words again and again " * 20)
    return {"{out}": str(root / "out"), "{out}.jsonl": str(root / "out.jsonl"), "{text}": str(root / "text")}


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_nonsense_is_refused(command, option, value, places, capsys):
    rest = [places.get(word, word) for word in REST.get(command, ())]
    if option in rest:
        del rest[rest.index(option) : rest.index(option) + 2]
    values = value.split(" ") if option == "--forced" else [value]
    words = [*command.split(), *rest, *([option] if option else []), *values]
    if value.startswith("-"):
        words[-2:] = [f"{option}={value}"]
    said = refusal(capsys, *words)
    name = option.lstrip("-").split(".")[-1]
    assert name in said or name.replace("-", "_") in said or value in said, said


@functools.cache
def tiny_config():
    moe = MoEConfig(n_experts=4, d_expert=8, router=RouterConfig(policy=TopK(k=2)))
    return ModelConfig(vocab_size=300, d_model=16, n_layers=1, moe=moe)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": "16"},
        {"d_model": -1},
        {"d_model": 10**13},
        {"d_model": 32},
        {"n_layers": 1.0},
        {"vocab_size": None},
        {"moe": 3},
        {"moe": {"router": {"policy": {"type": "TopK", "k": "2"}}}},
        {"moe": {"router": {"policy": {"type": "TopQ"}}}},
        {"moe": {"router": {"balance_coefficient": float("nan")}}},
        {"attention": {"n_heads": 0}},
        {"dtype": "float8"},
        {"layer_plan": ["F"]},
        {"blocks": [None]},
        None,
    ],
    ids=str,
)
def test_a_model_config_edited_by_hand_is_refused_by_name(change, tmp_path, capsys):
    save_pretrained(tmp_path, LanguageModel(tiny_config()).init_weights(0))
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(path.read_text()[:40] if change is None else json.dumps(stored | change))
    said = refusal(capsys, "lm", "generate", "--run", str(tmp_path))
    assert str(tmp_path) in said or "memory" in said


def test_a_tokenizer_of_another_model_is_refused(places, tmp_path, capsys):
    save_pretrained(tmp_path, LanguageModel(tiny_config()).init_weights(0))
    run("corpus", "prepare", "--data", places["{text}"], "--vocab-size", "290", "--root", str(tmp_path / "corpus"))
    (tokenizer,) = (tmp_path / "corpus").rglob("*.model")
    shutil.copy(tokenizer, tmp_path / "tokenizer.model")
    said = refusal(capsys, "lm", "generate", "--run", str(tmp_path))
    assert "290 tokens, the model's vocabulary has 300" in said


def test_a_policy_of_wrong_type_names_its_place(places, capsys):
    words = [places.get(word, word) for word in TINY_RUN]
    said = refusal(capsys, "staged_training", "parallel", *words, "--policy", '{"type": "TopK", "k": "2"}')
    assert "--policy.policy.k: '2', must be int" in said


def test_a_refusal_is_one_line_and_names_the_option(places, capsys):
    words = [places.get(word, word) for word in TINY_RUN]
    said = refusal(capsys, "staged_training", "run", *words, "--save-every", "0")
    assert said == "error: --save-every: ExecutionConfig.save_every: 0, must be at least 1\n"
    said = refusal(capsys, "staged_training", "run", *words, "--seq-len", "4096", "--dry-run")
    assert said.startswith("error: ")
    assert "StagingConfig.seq_len: 4 x 4096 tokens per batch; the training text has" in said


HELPED = {
    "ablations": "list compare pairs gate report budgets calibrate difficulty counterfactual frontier agreement"
    " problems recall mixture corpora tokenizers scaling runs prune",
    "staged_training": "run parallel sweep adapt diagnostics profile",
    "lm": "generate evaluate few-shot eval cache bench bench-peers bench-bits long-context recall"
    " quantize layer-experts import export gguf parity",
    "corpus": "refine dirt facts dots prepare tokenizers mixture",
    "moe": "bench",
    "triton_kernels": "inspect bench gpu-check",
}


# Beside them, what lies a level deeper.
DEEPER = [("ablations", f"scaling {name}") for name in ("fit", "curves", "predict", "compare", "ladder", "plan")]
COMMANDS = [(package, name) for package, names in HELPED.items() for name in names.split()] + DEEPER


def help_of(package, command, capsys, monkeypatch):
    # So wide that no line is broken.
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        run(package, *command.split(), "--help")
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(("package", "command"), COMMANDS)
def test_help_speaks_of_the_command_only(package, command, capsys, monkeypatch):
    said = " ".join(help_of(package, command, capsys, monkeypatch).split())
    assert said.startswith(f"usage: python -m {package} {command}")
    assert "options options" not in said
    assert not any(name in said for name in INTERNAL)


@pytest.mark.parametrize(("package", "command"), [*COMMANDS, ("demos", "")])
def test_every_option_has_a_sentence(package, command, capsys, monkeypatch):
    lines = [line.strip("│| ") for line in help_of(package, command, capsys, monkeypatch).splitlines()]
    options: dict[str, str] = {}
    for line in lines:
        if re.match(r"--?[a-z]", line):
            # The name with what stands for its value, two spaces, the sentence.
            name, _, sentence = line.partition("  ")
            options[name] = sentence
        elif options and re.match(r"[\w(\"'.]", line):
            options[list(options)[-1]] += f" {line}"
    bare = [name for name, sentence in options.items() if len(re.sub(r"\((default|required|sets).*", "", sentence)) < 8]
    assert len(options) > 0
    assert not bare, bare


@pytest.mark.parametrize(("package", "command"), [*COMMANDS, *((package, "") for package in DEMOS)])
def test_every_command_takes_its_options_from_a_file(package, command, capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("help = true\n")
    with pytest.raises(SystemExit) as stopped:
        run(package, *command.split(), "--config", str(path))
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith(f"usage: {package if package in DEMOS else f'python -m {package}'}")
