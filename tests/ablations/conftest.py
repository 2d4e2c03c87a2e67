"""A comparison folder written by hand: six arms, three seeds, with known means, for tests of what is computed from
records."""

import json
import math
import random

import pytest

from ablations.comparison.records import (
    COMPARISON_FILE,
    BranchResult,
    BudgetPoint,
    Comparison,
    MethodSummary,
    RunReference,
)
from foundation.serialize import save_json
from foundation.tables import write_rows
from staged_training.record import SECTIONS, Ledger, SectionLoss

EFFECT = {"baseline": 0.0, "twin": 0.0, "other_order": 0.0, "top_p": -0.02, "null_experts": 0.001, "random_k": 0.03}
KINDS = {"twin": "rounding", "other_order": "seed"}
BUDGETS = (2, 4, 6, 8, 12, 16)
TRUNK_TOKENS, BRANCH_TOKENS, STEP = 8_000_000, 2_000_000, 10_000


def write_comparison(root, *, trunk_seeds=(0,), branch_seeds=(0, 1, 2), methods=tuple(EFFECT)):
    """Writes run folders under `root` and returns the folder of the comparison."""
    rng = random.Random(0)
    folder = root / "comparisons" / "synthetic"
    folder.mkdir(parents=True)
    trunks = tuple(
        RunReference(method="trunk", trunk_seed=t, branch_seed=0, folder=f"../../trunks/{t}") for t in trunk_seeds
    )
    branches = tuple(
        RunReference(
            method=method, trunk_seed=trunk, branch_seed=seed, folder=f"../../branches/{method}_{trunk}_{seed}"
        )
        for trunk in trunk_seeds
        for seed in branch_seeds
        for method in methods
    )
    comparison = Comparison(
        methods=tuple(
            MethodSummary(name=name, question=f"What does {name} do?", kind=KINDS.get(name, "routing"))
            for name in methods
        ),
        trunk_seeds=trunk_seeds,
        branch_seeds=branch_seeds,
        n_layers=8,
        boundary=7,
        fresh=False,
        trunk_tokens=TRUNK_TOKENS,
        branch_tokens=BRANCH_TOKENS,
        tokens_per_step=STEP,
        bytes_per_token=3.6,
        valid_bytes=512_000,
        xz_bits_per_byte=1.7,
        plan="trunk, then branches <&>",
        command="python -m ablations compare",
        trunks=trunks,
        branches=branches,
    )
    save_json(folder / COMPARISON_FILE, comparison)
    for reference in trunks:
        losses = [
            5 + 20 / (1 + tokens / 400_000) + rng.gauss(0, 0.03) for tokens in range(STEP, TRUNK_TOKENS + 1, STEP)
        ]
        write_run(folder / reference.folder, losses, {"trunk": (8e12, 80.0), "caching": (1e12, 5.0)})
        write_sections(folder / reference.folder, 2.0, rng)
        (folder / reference.folder / "result.json").write_text("{}")
    common: dict = {}
    for reference in branches:
        batches, level = common.setdefault(
            (reference.trunk_seed, reference.branch_seed),
            (
                [
                    5.5 - 0.5 * tokens / BRANCH_TOKENS + rng.gauss(0, 0.1)
                    for tokens in range(STEP, BRANCH_TOKENS + 1, STEP)
                ],
                rng.gauss(0, 0.01),
            ),
        )
        effect = EFFECT[reference.method] + rng.gauss(0, 0.0015)
        losses = [loss + 3 * effect * step / len(batches) for step, loss in enumerate(batches)]
        write_run(folder / reference.folder, losses, {"branches": (2e11, 4.0), "evaluation": (9e10, 1.0)})
        write_sections(folder / reference.folder, 1.9 + level + effect, rng)
        save_json(folder / reference.folder / "result.json", measurements(reference, 1.9 + level + effect))
    return folder


def write_sections(folder, bits_per_byte, rng):
    """400 sections of 40 documents, some harder than others."""
    harder = [rng.gauss(0, 0.02) for _ in range(400)]
    mean = sum(harder) / 400
    losses = [
        SectionLoss(document=number // 10, n_bytes=1280, nats=1280 * math.log(2) * (bits_per_byte + own - mean))
        for number, own in enumerate(harder)
    ]
    write_rows(folder / SECTIONS, SectionLoss, losses)


def write_run(folder, losses, costs):
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"commit": "abc", "device": "cpu"}))
    write_lines(
        folder / "metrics.jsonl",
        ({"step": step, "loss": loss, "mean_experts": 11.0 + step % 2} for step, loss in enumerate(losses, 1)),
    )
    write_lines(folder / "diagnostics.jsonl", (diagnostics(step, folder) for step in (len(losses) // 2, len(losses))))
    write_lines(folder / "timing.jsonl", ({"step": step, "seconds": 0.02} for step, _ in enumerate(losses, 1)))
    Ledger({kind: {"flops": flops, "seconds": seconds} for kind, (flops, seconds) in costs.items()}).save(folder)


def diagnostics(step, folder):
    """Of the 8 layers of a trunk, of the last one of a branch."""
    layers = range(8) if folder.parent.name == "trunks" else [7]
    numbers = {
        "asked": 12,
        "realised": 12 + step / 1000,
        "max_load": 1.5,
        "dead_experts": 3,
        "entropy": 4.0,
        "margin": None,
        "experts_per_token": [0, 1],
    }
    measured = 2.2 - step / 10_000
    return {"step": step, "layers": [{"layer": layer, **numbers} for layer in layers], "valid_bits_per_byte": measured}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def measurements(reference, bits_per_byte):
    by_method = {
        "top_p": (0, 5, 9, 20, 31, 40, 60, 70, 90, 110, 120, 130, 120, 100, 80, 60, 40),
        "null_experts": (0,) * 10 + (30, 60, 80, 60, 30),
    }
    counts = by_method.get(reference.method, (0,) * 12 + (500,))
    slope = 0.001 if reference.method == "random_k" else 0.004
    return BranchResult(
        method=reference.method,
        trunk_seed=reference.trunk_seed,
        branch_seed=reference.branch_seed,
        bits_per_byte=bits_per_byte,
        mean_experts=sum(k * n for k, n in enumerate(counts)) / sum(counts),
        asked_experts=12.0,
        experts_histogram=counts,
        budgets=tuple(
            BudgetPoint(asked_experts=k, mean_experts=k, bits_per_byte=bits_per_byte + (12 - k) ** 2 * slope)
            for k in (2, 4, 6, 8, 12, 16)
        ),
        total_parameters=9_000_000,
        active_parameters=2_500_000.0,
        forward_flops=5e6,
        scratch_flops=6e5,
        cache_bytes_4k=2048.0,
        cache_bytes_64k=2048.0,
        budget_tokens=8192,
        budget_flops=1e10,
    )


WORDS = (
    "the",
    "of",
    "a",
    "model",
    "token",
    "expert",
    "layer",
    "routes",
    "each",
    "gate",
    "with",
    "mean",
    "over",
    "more",
    "learns",
    "text",
)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """Forty small documents of few words: enough to learn from in a few steps, and to split into train and valid."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for number in range(40):
        lines = (" ".join(rng.choices(WORDS, k=rng.randint(5, 14))) for _ in range(30))
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny_model():
    """Options of a model that trains in milliseconds per step, deep enough for a plan of eight letters."""
    return {
        "n_layers": 8,
        "layer_plan": "F",
        "d_model": 16,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 8,
        "window": 8,
        "n_experts": 8,
        "d_expert": 8,
        "k": 3,
        "dtype": "float32",
    }


@pytest.fixture(scope="session")
def comparison_folder(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("comparison"))


@pytest.fixture
def write_synthetic(tmp_path):
    """A function that writes a variant of the comparison and returns its folder."""
    return lambda **options: write_comparison(tmp_path, **options)


@pytest.fixture(scope="module")
def undrawn():
    """Reports with their tables and texts, and without figures, which take nine tenths of a report's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ablations.report.report.svg", lambda draw, label: "<svg></svg>")
        yield
