"""The search for a mixture: what is drawn, what small runs give, whether the best one is found, and the command."""

import csv
import dataclasses
import json
import random

import numpy as np
import pytest

from ablations.mixture.options import MixtureSearchOptions
from ablations.mixture.proxies import NgramProxy, draw_mixtures, run_proxies, within_caps
from ablations.mixture.search import best_mixture, cross_validate, search
from corpus.mixture import PROCESS, GaussianProcess, Runs
from corpus.prepare import CorpusConfig, prepare
from corpus.shares import capped
from lm.options import ModelOptions
from staged_training.staging import StagingConfig

TOKENS = {"a": 1000, "b": 4000, "c": 9000}


def test_drawn_mixtures_are_mixtures_within_their_caps():
    most_D = np.array([0.2, 0.7, 1.0])
    drawn_ND = draw_mixtures(TOKENS, 500, 0, most_D)
    assert np.allclose(drawn_ND.sum(axis=1), 1)
    assert (drawn_ND <= most_D + 1e-12).all()
    # From nearly one domain to all of them.
    assert (drawn_ND.max(axis=1) > 0.95).any()
    assert (drawn_ND.min(axis=1) > 0.1).any()
    assert (draw_mixtures(TOKENS, 10, 0, most_D) == drawn_ND[:10]).all()
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    for row, found in zip(rows, within_caps(rows, most_D)):
        expected = capped(dict(zip("abc", row)), {"a": 200, "b": 700, "c": 1000}, length=1000, cap=1)
        assert found == pytest.approx(list(expected.values()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of one grammar each, and a third that is half of either."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = {
        name: ["".join(draw.choices(letters, k=4)) for _ in range(50)]
        for name, letters in (("a", "abcd"), ("b", "wxyz"))
    }
    words["c"] = words["a"][:25] + words["b"][:25]
    for name, own in words.items():
        texts = [" ".join(draw.choices(own, k=80)) for _ in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    config = CorpusConfig(data=(str(data),), vocab_size=300, valid_share=0.2)
    return prepare(config, tmp_path_factory.mktemp("corpus"))


def test_a_small_run_is_better_at_what_it_learnt(prepared):
    proxy = NgramProxy(corpus=prepared, order=2, tokens=4000, valid=2000)
    only_a, only_b = proxy({"a": 1.0, "b": 0.0, "c": 0.0}), proxy({"a": 0.0, "b": 1.0, "c": 0.0})
    assert only_a["a"] < 0.7 * only_b["a"]
    assert only_b["b"] < 0.7 * only_a["b"]
    assert proxy({"a": 0.5, "b": 0.5, "c": 0.0})["c"] < min(only_a["c"], only_b["c"])


def test_tried_mixtures_are_not_tried_again(tmp_path):
    mixture_ND = draw_mixtures(TOKENS, 20, 0, np.ones(3))
    tried = []

    def measure(shares):
        tried.append(shares)
        if len(tried) == 11:
            raise KeyboardInterrupt
        return {domain: 1 - share for domain, share in shares.items()}

    with pytest.raises(KeyboardInterrupt):
        run_proxies(("a", "b", "c"), mixture_ND, measure, tmp_path)
    runs = run_proxies(("a", "b", "c"), mixture_ND, measure, tmp_path)
    # Eight had been saved.
    assert len(tried) == 11 + 12
    assert np.allclose(runs.loss_NV, 1 - mixture_ND)


def test_the_best_mixture_of_a_known_law_is_found():
    ideal_D = np.array([0.2, 0.3, 0.5])
    mixture_ND = draw_mixtures(TOKENS, 150, 0, np.ones(3))
    names = ("a", "b", "c")

    def losses(x_ND):
        # Their mean is least at the ideal shares: each falls with the logarithm of its own.
        return -ideal_D * np.log(x_ND + 1e-3)

    runs = Runs(names, names, mixture_ND, losses(mixture_ND))
    assert all(row.spearman > 0.97 for row in cross_validate(runs) if row.regression == PROCESS)
    options = MixtureSearchOptions()
    found_D = best_mixture(GaussianProcess(runs), TOKENS, np.ones(3), options)
    assert np.abs(found_D - ideal_D).max() < 0.06
    assert best_mixture(GaussianProcess(runs), TOKENS, np.array([1, 1, 0.3]), options)[2] <= 0.3 + 1e-9
    # A domain that is not aimed at gets next to nothing.
    only_D = best_mixture(GaussianProcess(runs), TOKENS, np.ones(3), MixtureSearchOptions(target=("a", "b")))
    assert only_D[2] < 0.03
    assert np.abs(only_D[:2] - (0.4, 0.6)).max() < 0.06


OPTIONS = {
    "corpus": CorpusConfig(vocab_size=300, valid_share=0.2),
    "model": ModelOptions(
        n_layers=1, d_model=16, layer_plan="F", n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4, d_expert=8, k=2
    ),
    "staging": StagingConfig(tokens=2560, batch_size=16, seq_len=32, calibration_tokens=32, epoch_cap=4),
}


def options_of(data, out, **changes):
    corpus = CorpusConfig(data=(str(data),), vocab_size=300, valid_share=0.2)
    return MixtureSearchOptions(**{**OPTIONS, "corpus": corpus, "out": out, "proxies": 10, "seeds": 2, **changes})


def test_a_search_leaves_its_tables_and_is_not_run_twice(data, tmp_path, capsys, monkeypatch):
    options = options_of(data, tmp_path, proxy_tokens=2000, proxy_valid=300)
    search(options)
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 5
    with (tmp_path / "shares.csv").open() as file:
        shares = list(csv.DictReader(file))
    for name in ("best", "natural", "uniform"):
        own = [float(row["share"]) for row in shares if row["mixture"] == name and row["domain"] != "macro"]
        assert sum(own) == pytest.approx(1)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "predicted macro" in printed
    from ablations.mixture import proxies

    monkeypatch.setattr(proxies, "code_lengths", None)
    search(options)
    again = capsys.readouterr().out
    assert "10 of 10 mixtures were tried before" in again
    assert "step" not in again


def test_the_model_itself_can_be_what_is_tried(data, tmp_path, capsys):
    search(options_of(data, tmp_path, proxy="model", proxy_tokens=2560, seeds=0, target=("a", "b")))
    (table,) = tmp_path.glob("proxies_*/losses.csv")
    assert len(table.read_text().splitlines()) == 11
    with (tmp_path / "shares.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["mixture"] == "best"]
    predicted = {row["domain"]: float(row["predicted"]) for row in rows}
    assert predicted["target"] == pytest.approx((predicted["a"] + predicted["b"]) / 2)
    assert "predicted target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": ("d",)}, "--target d: .*Legal: a, b, c, macro; macro stands alone"),
        ({"target": ("a", "macro")}, "--target macro: "),
        ({"corpus": "a.jsonl"}, "has one domain, a"),
    ],
)
def test_what_cannot_be_searched_is_refused(data, tmp_path, changes, said):
    if "corpus" in changes:
        changes = {"corpus": CorpusConfig(data=(str(data / changes["corpus"]),), vocab_size=300)}
    options = options_of(data, tmp_path)
    with pytest.raises(ValueError, match=said):
        search(dataclasses.replace(options, **changes))


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="the best one is looked for"):
        MixtureSearchOptions(staging=StagingConfig(mixture="uniform"))
    with pytest.raises(ValueError, match="leaves the noise unknown"):
        MixtureSearchOptions(seeds=1)
