"""`--trunk-share 0`: every arm is trained whole, and what is said of it knows no trunk."""

import pytest

from ablations.comparison.compare import run_comparison
from ablations.comparison.options import ModelOptions, Options
from ablations.comparison.records import read_records
from ablations.comparison.registry import find_methods
from ablations.comparison.verdicts import outcomes
from ablations.report.report import write_report
from ablations.report.table import table_text
from corpus.prepare import CorpusConfig
from staged_training.checkpoint import load_latest
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig

pytestmark = pytest.mark.usefixtures("undrawn")

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_folder, tiny_model):
    options = Options(
        seeds=2,
        out=tmp_path_factory.mktemp("whole"),
        budget_batches=1,
        model=ModelOptions(**{**tiny_model, "n_layers": 4}),
        staging=StagingConfig(tokens=STEPS * 256, trunk_share=0.0, freeze=0.0, batch_size=4, seq_len=64),
        corpus=CorpusConfig(data=(str(text_folder),), vocab_size=300),
        execution=ExecutionConfig(save_every=STEPS),
    )
    methods = find_methods(["sliding_window_hybrid", "twin"])
    found = run_comparison(methods, options)
    assert run_comparison(methods, options) == found
    return found


def test_every_arm_trains_on_all_tokens_from_weights_of_its_seed(folder):
    records = read_records(folder)
    comparison = records.comparison
    assert (comparison.trunk_tokens, comparison.branch_tokens) == (0, STEPS * 256)
    assert comparison.about == "all blocks, all of the tokens"
    for method in records.methods:
        for run in records.branches[method].values():
            assert len(run.losses) == STEPS
    (trunk,) = (folder / reference.folder for reference in comparison.trunks)
    assert load_latest(trunk / "checkpoints").step == 0
    schedule = records.branches["baseline"]
    assert schedule.keys() == {(0, 0), (0, 1)}


def test_what_is_said_knows_no_trunk(folder):
    records = read_records(folder)
    words = [outcome.words for outcome in outcomes(records).values()]
    assert not any("trunk" in word for word in words), words
    text = table_text(records)
    assert "Every arm is trained whole" in text
    write_report(records)
    assert (folder / "report.html").stat().st_size > 10_000


def test_without_a_trunk_nothing_can_be_frozen():
    with pytest.raises(ValueError, match=r"freeze: 0\.5 without a trunk \(trunk_share 0\); legal: 0"):
        StagingConfig(trunk_share=0.0, freeze=0.5)
    with pytest.raises(ValueError, match=r"whole_decay_share: 0\.9 beside a warmup_share of 0\.2"):
        StagingConfig(whole_decay_share=0.9, warmup_share=0.2)
