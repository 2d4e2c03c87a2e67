"""Losses of mixtures from small runs: made-up runs whose law is known, and public ones."""

import numpy as np
import pytest

from corpus.__main__ import main
from corpus.mixture import GaussianProcess, LinearRegression, MixtureConfig, Runs, agreement, read_runs
from foundation.tables import write_table
from tests.corpus.refining import shared

DOMAINS = ("books", "code", "web", "wiki")


def made_up(n: int, seed: int, scale: float = 1.0) -> Runs:
    """Losses that fall with the root of a domain's share, as those of language models do."""
    rng = np.random.default_rng(seed)
    mixture = rng.dirichlet(np.full(4, 0.7), n)
    use = np.array([[2.0, 0.1, 0.3, 0.4], [0.0, 3.0, 0.2, 0.1]])
    return Runs(DOMAINS, ("prose", "python"), mixture, scale * (5 - np.sqrt(mixture + 0.001) @ use.T))


def write(folder, name: str, runs: Runs):
    paths = folder / f"{name}_mixture.csv", folder / f"{name}_loss.csv"
    numbers = range(1, len(runs) + 1)
    for path, columns, values in zip(paths, (runs.domains, runs.losses), (runs.mixture_ND, runs.loss_NV)):
        write_table(path, ("index", *columns), [(number, *row.tolist()) for number, row in zip(numbers, values)])
    return paths


def test_a_process_orders_what_a_plane_does_not():
    learnt, unseen = made_up(120, 0), made_up(80, 1, scale=0.6)
    linear, process = LinearRegression(learnt), GaussianProcess(learnt)
    rows = {(row.loss, row.regression): row for row in agreement({"a": linear, "b": process}, unseen, "x")}
    for loss in unseen.losses:
        assert rows[loss, "b"].spearman > 0.99
        assert rows[loss, "b"].spearman > rows[loss, "a"].spearman
    assert np.abs(process.predict(learnt.mixture_ND) - learnt.loss_NV).max() < 0.05


def test_a_linear_law_is_found_exactly():
    learnt = made_up(60, 0)
    weights = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0], [0.0, 4.0]])
    linear = Runs(learnt.domains, learnt.losses, learnt.mixture_ND, learnt.mixture_ND @ weights)
    assert LinearRegression(linear).predict(linear.mixture_ND) == pytest.approx(linear.loss_NV, abs=0.02)


def test_the_command_prints_and_stores_ranks(tmp_path, capsys):
    learnt, unseen = write(tmp_path, "small", made_up(60, 0)), write(tmp_path, "large", made_up(40, 1, scale=0.5))
    words = ["--mixtures", str(learnt[0]), "--losses", str(learnt[1]), "--csv", str(tmp_path / "ranks.csv")]
    main(["mixture", "fit", *words, "--test-mixtures", str(unseen[0]), "--test-losses", str(unseen[1])])
    said = capsys.readouterr().out
    assert "learning 2 losses from 60 mixtures of 4 domains" in said
    assert "large_loss" in said
    assert len((tmp_path / "ranks.csv").read_text().splitlines()) == 7


def test_files_that_cannot_be_used_are_named(tmp_path):
    mixture, loss = write(tmp_path, "a", made_up(5, 0))
    text = mixture.read_text()
    for broken, message in (
        (text.replace("\n2,", "\n7,"), "runs that are in one of them only: 2, 7"),
        (text.splitlines()[0], "no runs"),
        (text + "6,x,0,0,0\n", r"a_mixture.csv:7: could not convert"),
        (text + "6,1,0\n", r"a_mixture.csv:7: 2 finite numbers are needed"),
        ("index,a\n1,0.2\n2,1\n3,1\n4,1\n5,1\n", "run 1 is no mixture"),
    ):
        mixture.write_text(broken)
        with pytest.raises(ValueError, match=message):
            read_runs(mixture, loss)
    with pytest.raises(ValueError, match="one for one"):
        MixtureConfig(action="fit", mixtures=mixture, losses=loss, test_mixtures=(mixture,), test_losses=())


def test_public_runs_of_a_million_parameters_order_those_of_sixty_million():
    folder = shared("scaling", "regmix")
    runs = {
        name: read_runs(
            folder / f"{name.replace('_', '_mixture_')}.csv", folder / f"{name.replace('_', '_pile_loss_')}.csv"
        )
        for name in ("train_1m", "test_1m", "test_60m")
    }
    name = next(loss for loss in runs["train_1m"].losses if "pile_cc" in loss)
    place = runs["train_1m"].losses.index(name)
    one = {key: Runs(r.domains, (name,), r.mixture_ND, r.loss_NV[:, [place]]) for key, r in runs.items()}
    regressions = {"linear": LinearRegression(one["train_1m"]), "process": GaussianProcess(one["train_1m"], steps=4)}
    for target in ("test_1m", "test_60m"):
        found = {
            row.regression: row.spearman for row in agreement(regressions, one[target], target) if row.loss == name
        }
        assert found["linear"] == pytest.approx(0.9, abs=0.015)
        assert found["process"] > 0.985
