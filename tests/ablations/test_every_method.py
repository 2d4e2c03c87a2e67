"""Walks every registered method through one training step on the real path: text, plan, trunk, fork, step, evaluation,
measurements."""

import dataclasses
import json
import math
import random

import pytest
import torch

from ablations.comparison.compare import SharedExecution, prepare_job, run_in_turn
from ablations.comparison.options import Options
from ablations.comparison.records import BranchResult
from ablations.comparison.registry import all_methods, find_methods
from ablations.method import Method, with_policy
from corpus.prepare import CorpusConfig
from foundation.serialize import load_json
from lm.accounting import meta_model
from lm.options import ModelOptions
from routing.policies.top_k import TopK
from staged_training.boundary import different_blocks
from staged_training.checkpoint import load_latest
from staged_training.staging import StagingConfig

# A validation text of few batches.
BATCH, LENGTH = 4, 64


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, tiny_model):
    # Two steps of trunk and one of branch; all methods find the same trunk in the same folder.
    return Options(
        seeds=1,
        out=tmp_path_factory.mktemp("every_method"),
        budget_batches=1,
        # Two key/value heads, or a mixed layer would have none to spare.
        model=ModelOptions(**tiny_model | {"n_kv_heads": 2}),
        staging=StagingConfig(
            tokens=3 * BATCH * LENGTH, trunk_share=0.67, freeze=0.4, batch_size=BATCH, seq_len=LENGTH
        ),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300),
    )


@pytest.mark.parametrize("name", list(all_methods()))
def test_one_training_step(name, options):
    walk(find_methods([name]), options)


def test_one_training_step_of_an_architecture_of_any_name(options):
    """What a method is does not hang on its name: this one changes the shape of weights and keeps every letter. It also
    asks for another number of experts than the baseline's, and is measured against that."""

    def change(model):
        wide = dataclasses.replace(model.moe, d_expert=2 * model.moe.d_expert)
        return with_policy(dataclasses.replace(model, moe=wide), TopK(k=2))

    method = Method(name="few_wide_experts", question="Do fewer experts of twice the width do better?", change=change)
    measured = walk([*find_methods(["baseline"]), method], options)
    assert (measured.asked_experts, measured.mean_experts) == (2, 2.0)


def test_a_method_that_changes_nothing_of_this_baseline_is_refused(options):
    hybrid = dataclasses.replace(options, model=dataclasses.replace(options.model, layer_plan="SSSF", n_layers=4))
    with pytest.raises(ValueError, match="sliding_window_hybrid: it changes nothing of a baseline of layers SSSF"):
        prepare_job(find_methods(["sliding_window_hybrid"]), hybrid)


def global_random_states():
    return torch.get_rng_state().tolist(), random.getstate()


def walk(methods, options):
    """Takes the last of the methods through trunk, fork, one step and its measurements, beside the first."""
    method = methods[-1]
    job = prepare_job(methods, options)
    (plan,) = job.plans
    branch = plan.branches[-1]
    assert (branch.method, branch.stage.n_batches, plan.trunk.n_batches) == (method.name, method.length, 2)
    execution = SharedExecution(job, plan)
    before = global_random_states()
    run_in_turn(job, [execution])
    # Checkpoints hold none of them, so a method that drew from one would go on differently after a restart.
    assert global_random_states() == before
    folder = execution.folder_of(branch)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == method.length
    line = lines[0]
    assert math.isfinite(line["loss"])
    assert line["grad_norm"] > 0
    trunk, trained = load_latest(execution.trunk_folder / "checkpoints"), load_latest(folder / "checkpoints")
    assert trunk is not None
    assert trained is not None
    common = trained.weights.keys() & trunk.weights.keys()
    frozen = meta_model(branch.model).frozen_names(branch.boundary)
    assert frozen
    assert all(trained.weights[tensor].equal(trunk.weights[tensor]) for tensor in frozen)
    assert all(
        not trained.weights[tensor].equal(trunk.weights[tensor])
        for tensor in common - frozen
        if tensor.endswith(("weight_ED", "head_VD"))
    )

    measured = load_json(BranchResult, folder / "result.json")
    assert math.isfinite(measured.bits_per_byte)
    assert measured.branch_seed == 0
    counts = measured.experts_histogram
    assert sum(k * count for k, count in enumerate(counts)) / sum(counts) == pytest.approx(measured.mean_experts)
    assert [point.mean_experts for point in measured.budgets] == pytest.approx([1, 2, 3, 4], abs=0.6)
    assert 0 < measured.active_parameters < measured.total_parameters
    assert measured.scratch_flops > 2.5 * measured.forward_flops
    letters, trunk_letters = branch.model.plan.letters, plan.model.plan.letters
    different = different_blocks(plan.model, branch.model)
    assert all(block >= branch.boundary for block in different)
    if method.kind(job.baseline) == "architecture":
        assert branch.fresh
        assert different
    else:
        assert not branch.fresh
        assert not different
    if letters == trunk_letters:
        assert measured.cache_bytes_64k == measured.cache_bytes_4k
    else:
        assert letters[: branch.boundary] == ("F",) * branch.boundary
        assert set(letters[branch.boundary :]) - {"F"}
        baseline = load_json(BranchResult, execution.folder_of(plan.branches[0]) / "result.json")
        assert measured.cache_bytes_64k < baseline.cache_bytes_64k
    return measured
