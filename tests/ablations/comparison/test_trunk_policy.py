"""Trunks that favour no policy: trained with another one than any branch, the baseline's included, forks to."""

import dataclasses

import pytest

from ablations.comparison.compare import prepare_job, run_comparison, trunk_of
from ablations.comparison.options import Options
from ablations.comparison.records import read_records
from ablations.comparison.registry import find_methods
from ablations.comparison.reliability import form_of, reliability_statement
from ablations.comparison.verdicts import fork_shock
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from staged_training.staging import StagingConfig


@pytest.fixture(scope="module")
def options(tmp_path_factory, text_folder, tiny_model):
    return Options(
        seeds=1,
        out=tmp_path_factory.mktemp("runs"),
        budget_batches=1,
        trunk_policy="random_k",
        model=ModelOptions(**tiny_model | {"n_layers": 2}),
        staging=StagingConfig(tokens=6 * 2 * 32, trunk_share=0.67, batch_size=2, seq_len=32),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300),
    )


def test_every_branch_forks_from_it_to_its_own_policy(options, capsys):
    methods = find_methods(["fewer_experts", "top_p"])
    (plan,) = prepare_job(methods, options).plans
    router = plan.model.moe.router
    assert router.policy == RandomK(k_min=1, k_max=5, k_eval=3)
    assert [type(branch.model.moe.router.policy).__name__ for branch in plan.branches] == ["TopK", "TopK", "TopP"]
    assert plan.branches[0].model.moe.router.policy == TopK(k=3)
    folder = run_comparison(methods, options)
    assert folder is not None
    records = read_records(folder)
    # Beside the baseline's own first step from this trunk, on the same batch.
    (run,), (reference,) = records.branches["fewer_experts"].values(), records.branches["baseline"].values()
    in_nats = run.losses[0] - reference.losses[0]
    assert fork_shock(records, "fewer_experts") * records.comparison.bytes_per_token == pytest.approx(
        in_nats / 0.6931472
    )
    assert records.comparison.form == "fork67_freeze0_decay_from_random_k"
    assert "has not been measured" in reliability_statement(records.comparison.form)
    said = capsys.readouterr().out
    # The baseline is what questions are asked beside, whatever the trunk is.
    assert "fewer_experts          " in said
    assert [line for line in said.splitlines() if "Here: in" in line and " baseline " in line] == []
    # Another trunk, in another folder, than the baseline's.
    (usual,) = prepare_job(methods, dataclasses.replace(options, trunk_policy="baseline")).plans
    assert usual.trunk_hash != plan.trunk_hash
    assert form_of(options.staging) == "fork67_freeze0_decay"


def test_only_routing_can_be_the_trunks_alone(options):
    baseline = options.model.config(300)
    with pytest.raises(ValueError, match=r"no method 'random_q'; .*random_k"):
        trunk_of("random_q", baseline)
    with pytest.raises(
        ValueError, match=r"Options.trunk_policy: lightning_hybrid changes architecture; legal: a method"
    ):
        trunk_of("lightning_hybrid", baseline)
    with pytest.raises(ValueError, match=r"Options.trunk_policy: random_k without a trunk \(trunk_share 0\)"):
        dataclasses.replace(options, staging=dataclasses.replace(options.staging, trunk_share=0.0))
