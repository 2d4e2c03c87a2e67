"""Records what must not change when code moves, through public commands alone, so that old and new code can be asked.

    python tests/unchanged/record.py FOLDER              100 steps of a trunk, one branch of each method (half an hour)
    python tests/unchanged/record.py FOLDER --short      the same at a size for the tests (a minute)
    python tests/unchanged/record.py --compare A B       where two records differ, bit for bit

From the root of the checkout to record. A record holds the loss of every step, the weights' hashes, what was measured,
the csv files of the comparison and the continuation of a prompt with its bits per byte; the long one also every
command's help and the offline table of launches and bytes (`python -m triton_kernels inspect`).
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

POLICIES = (
    "twin", "other_order", "difficulty_head", "learned_threshold", "null_experts", "random_k", "relu", "relu_penalty",
    "score_threshold", "top_p",
)  # fmt: skip
PLANS = (
    "gated_delta_hybrid", "lightning_hybrid", "mixed_heads_hybrid", "shared_kv_hybrid", "sliding_window_hybrid",
)  # fmt: skip
COMMANDS = (
    "ablations --help", "ablations compare --help", "ablations report --help", "ablations budgets --help",
    "ablations difficulty --help", "ablations.top_p --help", "staged_training --help", "staged_training run --help",
    "staged_training parallel --help", "staged_training sweep --help", "staged_training diagnostics --help",
    "lm generate --help", "lm bench --help",
    "moe bench --help", "corpus prepare --help", "triton_kernels --help", "triton_kernels inspect --help",
    "triton_kernels bench --help", "triton_kernels gpu-check --help", "demos.terminal --help",
)  # fmt: skip
# What a run measures of the machine, not of the model.
TIMES = ("second", "time", "rate", "memory", "tokens_per")
SHORT = {
    "tokens": 1536, "trunk-share": 0.67, "batch-size": 2, "seq-len": 64, "calibration-tokens": 256, "budget-batches": 1,
    "d-model": 32, "n-layers": 4, "n-heads": 4, "n-kv-heads": 2, "head-dim": 8, "window": 16, "n-experts": 16,
    "d-expert": 8, "k": 4, "vocab-size": 300, "dtype": "float32",
}  # fmt: skip
# What the recorded commit trains by default: its own defaults stay, whatever later ones are better.
TRAINED = {
    **{"optimizer": "adamw", "embedding-rate": 1, "learning-rate": 0.008},
    **{"layer-plan": "F", "freeze": 0.85, "valid-share": 0.08},
}
SIZED = {"n-layers": 8, "window": 128, "d-expert": 32}


def run(*arguments: str) -> str:
    """Output of `python -m ...`; leaves with what it said where it fails."""
    # The torch forms, which are there on every machine, are the ones that later forms are held against.
    environment = {**os.environ, "HYBRID_MOE_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def made_on() -> dict[str, str]:
    """What rounding depends on: bits are equal where these are."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    wanted = ("model name", "cpu family", "model")
    processor = dict(line.split(":", 1) for line in reversed(lines) if line.split(":")[0].strip() in wanted)
    facts = {name.strip(): value.strip() for name, value in processor.items()}
    return {**facts, "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def help_words(command: str) -> list[str]:
    """The words of a command's help, without the frames and breaks that follow from the width of its lines."""
    return re.sub(r"[│╭╮╰╯─]", " ", run(*command.split())).split()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not any(word in key for word in TIMES)}
        return {key: without_times(item) for key, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def comparison(folder: Path, methods: tuple[str, ...], options: list[str]) -> dict[str, Any]:
    """Trains one trunk and one branch of each method; what they left."""
    run("ablations", "compare", "baseline", *methods, "--seeds", "1", "--out", str(folder), *options)
    found: dict[str, Any] = {}
    for path in [*sorted(folder.glob("trunks/*")), *sorted(folder.glob("branches/*"))]:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        found["trunk" if path.parent.name == "trunks" else path.name.rsplit("_", 1)[0]] = {
            "metrics": [without_times(json.loads(line)) for line in lines],
            "weights": hashlib.sha256((path / "model" / "weights.safetensors").read_bytes()).hexdigest(),
            "result": without_times(json.loads((path / "result.json").read_text())),
        }
    (at,) = folder.glob("comparisons/*")
    tables = {str(path.relative_to(at)): path.read_text().splitlines() for path in sorted(at.rglob("*.csv"))}
    # Seconds are a column of it.
    found["csv"] = {name: lines for name, lines in tables.items() if Path(name).name != "costs.csv"}
    return found


def continuations(folder: Path, max_new_tokens: int, only: str = "") -> dict[str, Any]:
    """What each branch (of the method `only`) writes on, and how many bits per byte it gives its own text."""
    import torch

    from corpus.tokenizer import Tokenizer
    from lm.model import token_losses
    from lm.pretrained import find_model, load_pretrained

    found = {}
    for branch in sorted(folder.glob(f"branches/{only}*")):
        text = run(
            "lm", "generate", "--run", str(branch), "--prompt", "def main(", "--max-new-tokens", str(max_new_tokens)
        )
        model, tokenizer = load_pretrained(find_model(branch)), Tokenizer.load(find_model(branch) / "tokenizer.model")
        ids = [tokenizer.boundary_id, *tokenizer.encode(text)]
        with torch.no_grad():
            nats = token_losses(model(torch.tensor([ids[:-1]])).logits_BTV, torch.tensor([ids[1:]])).double().sum()
        bits = float(nats) / math.log(2) / len(text.encode())
        found[branch.name.rsplit("_", 1)[0]] = {"text": text, "bits_per_byte": bits}
    return found


def write_text(path: Path) -> None:
    """A text that is the same on every machine: sentences of a small grammar."""
    draw = random.Random(0)
    nouns = [f"{a}{b}" for a in ("ta", "mo", "ri", "ka", "su") for b in ("len", "dor", "vik", "sha", "pel")]
    verbs = ["sees", "calls", "moves", "keeps", "finds", "leaves"]
    documents = []
    for _ in range(120):
        sentences = [f"The {draw.choice(nouns)} {draw.choice(verbs)} {draw.randint(1, 99)} {draw.choice(nouns)}."] * 2
        sentences += [f"def {draw.choice(nouns)}(x): return {draw.randint(1, 9)} * x\n" for _ in range(6)]
        documents.append(json.dumps({"text": " ".join(sentences)}))
    path.write_text("\n".join(documents) + "\n")


def record(folder: Path, *, short: bool) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if short:
        write_text(folder / "text.jsonl")
        options = [f"--{name}={value}" for name, value in {**SHORT, **TRAINED}.items()]
        options += ["--data", str(folder / "text.jsonl")]
        # Policies change no architecture and start from the trunk's blocks; plans start blocks anew.
        found = {
            "policies": comparison(folder / "policies", POLICIES, [*options, "--freeze", "0.5"]),
            "plans": comparison(folder / "plans", PLANS, [*options, "--freeze", "0.3"]),
        }
        runs = {
            f"{name}/{run}": {
                "losses": [line["loss"] for line in left["metrics"]],
                "weights": left["weights"],
                "bits_per_byte": (left["result"] or {}).get("bits_per_byte"),
            }
            for name, one in found.items()
            for run, left in one.items()
            if run != "csv"
        }
        tables = {name: one["csv"]["table.csv"] for name, one in found.items()}
        text = continuations(folder / "plans", 8, only="gated_delta_hybrid")
        return {"made_on": made_on(), "runs": runs, "tables": tables, "text": text}
    tokens = ["--tokens", "120471", *(f"--{name}={value}" for name, value in {**TRAINED, **SIZED}.items())]
    found: dict[str, Any] = {"help": {command: help_words(command) for command in COMMANDS}}
    found["policies"] = comparison(folder / "policies", POLICIES, [*tokens, "--freeze", "0.85"])
    small = ["--dtype", "float32", "--d-model", "64", "--freeze", "0.5"]
    found["plans"] = comparison(folder / "plans", PLANS, [*tokens, *small])
    found["text"] = {name: continuations(folder / name, 60) for name in ("policies", "plans")}
    run("triton_kernels", "inspect", "--csv", str(folder / "inspect.csv"))
    found["inspect"] = sorted((folder / "inspect.csv").read_text().splitlines())
    return found


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in sorted(a.keys() | b.keys())
            for line in differences(a.get(key), b.get(key), f"{place}/{key}")
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for index, (x, y) in enumerate(zip(a, b)) for line in differences(x, y, f"{place}[{index}]")]
    return [] if a == b else [f"{place}: {str(a)[:200]} != {str(b)[:200]}"]


if __name__ == "__main__":
    sys.path.insert(0, ".")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    arguments = parser.parse_args()
    if arguments.compare:
        first, second = (json.loads((folder / "record.json").read_text()) for folder in arguments.compare)
        lines = differences(first, second)
        print("\n".join(lines[:200]) or "equal, bit for bit")
        sys.exit(bool(lines))
    found = record(arguments.folder.resolve(), short=arguments.short)
    (arguments.folder / "record.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
