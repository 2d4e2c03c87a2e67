"""The difficulty study end to end, on a text and models so small that its numbers mean nothing: what is tested is that
they are all there."""

import csv
import dataclasses
import random
import shutil

import pytest

from ablations.counterfactual.frontier import frontier
from ablations.counterfactual.measure import EVEN, MEANING
from ablations.counterfactual.options import CounterfactualOptions, FrontierOptions, TextOptions
from ablations.counterfactual.study import counterfactual
from ablations.difficulty.analysis import analyse
from ablations.difficulty.frontier import OWN, RANDOM, TRAINED, UNIFORM
from ablations.difficulty.options import AnalysisOptions
from ablations.difficulty.training import (
    TrainingOptions,
    main_plan,
    prepare_text,
    read_study,
    run_name,
    train,
    with_tokens,
)
from corpus.prepare import CorpusConfig
from lm.options import ModelOptions
from staged_training.execute import ExecutionConfig
from staged_training.staging import StagingConfig

K = 4


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("difficulty")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(60)]
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text("\n".join(" ".join(rng.choices(words, k=9)) for _ in range(15)))
    return TrainingOptions(
        out=folder / "study",
        synthetic_documents=150,
        static=(2, K),
        model=ModelOptions(
            n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=8, d_expert=16, k=K, dtype="float32"
        ),
        staging=StagingConfig(tokens=6000, trunk_share=0.8, freeze=0.0, batch_size=2, seq_len=128),
        corpus=CorpusConfig(data=(str(folder),), vocab_size=400, valid_share=0.3),
        execution=ExecutionConfig(log_every=1000),
    )


@pytest.fixture(scope="module")
def study_folder(options):
    train(options)
    analyse(options.out, AnalysisOptions(forced=(1, 2, K, 7), budgets=(2, K), resamples=50, shuffles=10))
    return options.out


def table(folder, name):
    with (folder / "analysis" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_table_has_its_rows(study_folder):
    methods = ["random_k", "top_p", "difficulty_head"]
    study = read_study(study_folder)
    assert list(study.runs) == [*methods, "static_2", "static_4"]
    assert study.static == {"static_2": 2, "static_4": 4}
    rows = table(study_folder, "correlations")
    assert {(row["method"], row["difficulty"], row["layer"]) for row in rows} == {
        (method, difficulty, layer)
        for method in methods
        for difficulty in ("reference_loss", "learnability")
        for layer in ("0", "1", "sum")
    }
    assert {row["task"] for row in table(study_folder, "structure")} == {"addition", "recall", "word_problem"}
    assert len(table(study_folder, "deciles")) == len(methods) * 2 * 10
    assert {(row["weights"], row["allocation"], row["asked"]) for row in table(study_folder, "frontier")} == {
        *((method, UNIFORM, str(k)) for method in methods for k in (1, 2, K, 7)),
        *((method, allocation, str(k)) for method in methods for allocation in (OWN, RANDOM) for k in (2, K)),
        ("static_2", TRAINED, "2"),
        ("static_4", TRAINED, "4"),
    }
    assert (study_folder / "analysis" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_agree_with_each_other(study_folder):
    frontier = {(row["weights"], row["allocation"], row["asked"]): row for row in table(study_folder, "frontier")}
    for row in table(study_folder, "differences"):
        if row["against_allocation"] == TRAINED:
            continue
        own, other = (
            frontier[row["weights"], allocation, row["asked"]] for allocation in (OWN, row["against_allocation"])
        )
        assert float(row["difference"]) == pytest.approx(
            float(own["bits_per_byte"]) - float(other["bits_per_byte"]), abs=1e-5
        )
    uniform = [row for key, row in frontier.items() if key[1] == UNIFORM]
    assert all(float(row["mean_experts"]) == float(row["asked"]) for row in uniform)


def test_minutes_become_tokens_once(options, study_folder):
    """A run that is continued on a busier machine keeps its budget."""
    corpus, options = prepare_text(options), dataclasses.replace(options, minutes=0.01)
    model = options.model.config(corpus.tokenizer.vocab_size)
    tokens = with_tokens(options, corpus, model).staging.tokens
    assert tokens % 256 == 0
    assert tokens > 0
    assert with_tokens(dataclasses.replace(options, minutes=99.0), corpus, model).staging.tokens == tokens


@pytest.mark.parametrize("method", ["other_order", "random_k"])
def test_methods_that_choose_no_number_are_refused(options, method):
    with pytest.raises(ValueError, match=f"--methods {method}: must choose the number of experts"):
        train(dataclasses.replace(options, methods=(method,)))


def test_a_finished_study_is_found_again(study_folder):
    with pytest.raises(ValueError, match=r"no finished study\.json"):
        read_study(study_folder / "elsewhere")
    with pytest.raises(ValueError, match="must enclose the models' k = 4"):
        analyse(study_folder, AnalysisOptions(forced=(1, 2)))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_counterfactuals_of_a_run_are_of_its_held_out_text(study_folder, tmp_path):
    study = read_study(study_folder)
    out = counterfactual(CounterfactualOptions(run=(study_folder / study.runs["top_p"],), out=tmp_path, resamples=50))
    rows = read(out / "allocations.csv")
    whole = {row["allocation"]: row for row in rows if row["part"] == "all"}
    assert list(whole) == list(MEANING)
    # One total for all, which the policy sets.
    assert {row["mean_experts"] for row in whole.values()} == {whole[OWN]["mean_experts"]}
    assert float(whole[EVEN]["gain"]) == 0
    parts = {row["part"] for row in rows}
    # Domains are the names of the files; the generated problems are one.
    assert {"easy half", "hard half", "layer 0", "layer 1", "domain synthetic"} <= parts
    assert "validation documents of the runs' corpus" in (out / "verdict.txt").read_text()


def test_the_frontier_of_runs(study_folder, tmp_path):
    study = read_study(study_folder)
    runs = tuple(study_folder / study.runs[name] for name in ("top_p", "static_2"))
    out = frontier(
        FrontierOptions(
            run=runs,
            out=tmp_path,
            budgets=(2, K, 9),
            text=TextOptions(documents=20),
            repeats=1,
            prefill=16,
            decode=4,
            sequences=(1, 2),
            resamples=50,
        )
    )
    rows = read(out / "frontier.csv")
    # Nine experts are more than there are.
    assert [(row["weights"].split("_trunk")[0], row["allocation"], float(row["asked"])) for row in rows] == [
        *(("top_p", OWN, k) for k in (2, K)),
        *(("top_p", UNIFORM, k) for k in (2, K)),
        ("static_2", TRAINED, 2),
        ("static_2", UNIFORM, K),
    ]
    for row in rows:
        assert all(0 < float(row[f"{name}_seconds"]) < 1 for name in ("prefill", "decode_1", "decode_2"))
        if row["allocation"] != OWN:
            assert float(row["mean_experts"]) == float(row["asked"])
    against = {(row["asked"], row["against_allocation"]) for row in read(out / "differences.csv")}
    assert against == {("2", UNIFORM), ("2", TRAINED), ("4", UNIFORM)}
    assert "seconds fall this many times as fast" in (out / "verdict.txt").read_text()


def test_a_model_without_its_run_needs_text(study_folder, tmp_path):
    model = study_folder / read_study(study_folder).models["top_p"]
    shutil.copytree(model, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"alone is a model without its run, .* give --data"):
        counterfactual(CounterfactualOptions(run=(tmp_path / "alone",), out=tmp_path / "out"))


def test_every_seed_has_a_trunk_of_its_own(options):
    corpus = prepare_text(options)
    model = options.model.config(corpus.tokenizer.vocab_size)
    first, second = (main_plan(options, corpus, model, seed) for seed in (0, 1))
    assert (first.trunk_seed, second.trunk_seed) == (0, 1)
    assert {branch.seed for branch in second.branches} == {1}
    assert [run_name("top_p", seed) for seed in (0, 1)] == ["top_p", "top_p_seed_1"]
