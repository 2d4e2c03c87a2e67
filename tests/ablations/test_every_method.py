"""Walks every registered method through one training step on the real path: text, plan, trunk, fork, step, evaluation,
measurements."""

import json
import math

import pytest

from ablations.compare import SharedExecution, prepare_job, run_branches
from ablations.defaults import ModelOptions, Options
from ablations.records import Measurements
from ablations.registry import all_methods, find_methods
from corpus.prepare import CorpusConfig
from foundation.serialize import load_json
from lm.accounting import meta_model
from staged_training.checkpoint import load_latest
from staged_training.staging import StagingConfig

BATCH, LENGTH = 2, 32


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
    job = prepare_job(find_methods([name]), options)
    (plan,) = job.plans
    branch = plan.branches[-1]
    assert (branch.method, branch.stage.n_batches, plan.trunk.n_batches) == (name, 1, 2)
    execution = SharedExecution(job, plan)
    run_branches(job, execution)
    folder = execution.folder_of(branch)

    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
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

    measured = load_json(Measurements, folder / "result.json")
    assert math.isfinite(measured.bits_per_byte)
    assert measured.branch_seed == 0
    counts = measured.experts_histogram
    assert sum(k * count for k, count in enumerate(counts)) / sum(counts) == pytest.approx(measured.mean_experts)
    assert [point.mean_experts for point in measured.budgets] == pytest.approx([1, 2, 3, 4], abs=0.6)
    assert 0 < measured.active_parameters < measured.total_parameters
    assert measured.scratch_flops > 2.5 * measured.forward_flops
    if "hybrid" in name:
        assert branch.fresh
        assert branch.model.plan.letters[: branch.boundary] == ("F",) * branch.boundary
        assert set(branch.model.plan.letters[branch.boundary :]) - {"F"}
        assert (
            measured.cache_bytes_64k
            < load_json(Measurements, execution.folder_of(plan.branches[0]) / "result.json").cache_bytes_64k
        )
    else:
        assert not branch.fresh
        assert measured.cache_bytes_64k == measured.cache_bytes_4k
