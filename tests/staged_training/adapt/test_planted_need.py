"""Where half of the tokens need one expert and half eight, a model that knew nothing of it is taught to give them that.

The original's weights are written down: it uses all eight experts for every token, and its router ranks them without
telling easy letters from hard ones. Routers alone are taught, since experts that learn would change what is needed.
What a method makes of it in a short stage is measured letter by letter.
"""

import json
import random

import numpy as np
import pytest
import torch

from lm.pretrained import load_pretrained, save_pretrained
from routing.policies.top_k import TopK
from staged_training.__main__ import main
from staged_training.record import read_run
from tests.ablations.counterfactual import planted as truth

MEAN = 4.5


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Folder of the run, and text: `text.jsonl`."""
    root = tmp_path_factory.mktemp("planted")
    model, ids = truth.planted_model(np.zeros(truth.V, dtype=bool), policy=TopK(k=truth.E))
    save_pretrained(root / "run" / "model", model, ids.repeat(8).view(8, truth.V), truth.tokenizer())
    rng = random.Random(1)
    lines = []
    for _ in range(600):
        letters = [rng.randrange(truth.V)]
        while len(letters) < 64:
            letters.append(rng.randrange(truth.V) if rng.random() < 0.1 else truth.next_letter(letters[-1]))
        lines.append(json.dumps({"text": "".join(truth.LETTERS[letter] for letter in letters)}) + "\n")
    (root / "text.jsonl").write_text("".join(lines))
    return root


def taught(root, method, *words):
    """Experts that easy and hard letters get in the mean, after a stage of the public command."""
    out = root / method
    command = ["adapt", "--run", str(root / "run"), "--out", str(out), "--data", str(root / "text.jsonl")]
    command += ["--method", method, "--tokens", "24000", "--batch-size", "4", "--seq-len", "64"]
    command += ["--learning-rate", "2e-2", "--calibration-tokens", "2048", "--then", "routers", *words]
    main(command)
    (folder,) = out.glob(f"{method}_mean_*")
    assert read_run(folder).result["original_experts"] == truth.E
    model = load_pretrained(folder / "model")
    ids = torch.tensor([truth.tokenizer().encode(letter)[0] for letter in truth.LETTERS])
    with torch.no_grad():
        (routing,) = model(ids.view(-1, 1)).routings
    experts_V = torch.bincount(routing.assignments.token_N, minlength=truth.V).numpy()
    return experts_V[~truth.HARD].mean(), experts_V[truth.HARD].mean()


def found(easy, hard):
    return easy < 2 and hard > 7


# A head that is told by the loss what a token's last experts are worth finds it. A score learns only while its expert
# is used, and is also what that weighs: measured, for easy and hard letters, 7.0 and 2.0 (top_p), 5.3 and 3.8
# (zero_experts), 6.9 and 2.0 (threshold).
LOST = [pytest.mark.long, pytest.mark.xfail(strict=True, reason="does not find the allocation that was planted")]
METHODS = ["difficulty", *(pytest.param(name, marks=LOST) for name in ("top_p", "zero_experts", "threshold"))]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_finds_who_needs_how_many(original, method):
    assert found(*taught(original, method, "--mean", str(MEAN)))


def test_a_method_that_gives_all_the_same_does_not(original):
    easy, hard = taught(original, "random_k", "--mean", "4")
    assert easy == hard == 4
    assert not found(easy, hard)
