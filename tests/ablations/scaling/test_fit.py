"""The two fitters find known laws and each other's minima; what points cannot say is said; bad tables are refused."""

import csv

import numpy as np
import pytest

from ablations.scaling.fit import fit_command
from ablations.scaling.forms import LAWS, predict
from ablations.scaling.huber import fit_by_huber
from ablations.scaling.intervals import bootstrap, percentiles, profile
from ablations.scaling.isoflop import IsoflopRow
from ablations.scaling.options import Columns, FitOptions
from ablations.scaling.points import Points, read_points, without_highest
from ablations.scaling.variable_projection import fit_by_projection
from foundation.tables import read_rows

CHINCHILLA = Columns(total_params="Model Size", flops="Training FLOP")
TRUTH = {"E": 1.8, "A": 400.0, "B": 2000.0, "a": 0.35, "b": 0.37}


def made_up(law="total", values=TRUTH, noise=0.003, sizes=7, seed=0):
    """Points of a known law with noise in log loss."""
    generator = np.random.default_rng(seed)
    law = LAWS[law]
    size, tokens = np.meshgrid(np.geomspace(3e7, 3e9, sizes), np.geomspace(5e8, 1e11, 8))
    variables = {"total_params": size.ravel(), "active_params": size.ravel() / 3, "tokens": tokens.ravel()}
    variables["granularity"] = np.resize([1.0, 2.0, 4.0, 8.0, 16.0], size.size)
    variables = {name: variables[name] for name in law.variables}
    loss_P = predict(law, [values[name] for name in law.parameters], variables)
    noisy_P = loss_P * np.exp(noise * generator.standard_normal(size.size))
    return Points(variables=variables, loss_P=noisy_P, weight_P=np.ones(size.size))


def write(path, points):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*points.variables, "loss"])
        writer.writerows(zip(*points.variables.values(), points.loss_P))
    return path


@pytest.fixture(scope="module")
def chinchilla(public_data):
    return read_points(public_data("chinchilla/svg_extracted_data.csv"), CHINCHILLA, LAWS["total"])


@pytest.mark.parametrize("fitter", [fit_by_projection, fit_by_huber])
def test_chinchillas_points_give_the_published_law(chinchilla, fitter):
    """Besiroglu 2024 (arXiv 2404.10102): E 1.8172; their notebook's optimum for the exponents and the objective."""
    points = chinchilla.subset(without_highest(chinchilla, 5))
    assert len(points) == 240
    fit = fitter(points, LAWS["total"])
    assert fit.values["E"] == pytest.approx(1.8172, abs=0.002)
    assert fit.values["a"] == pytest.approx(0.3473, abs=0.001)
    assert fit.values["b"] == pytest.approx(0.3672, abs=0.001)
    assert fit.objective <= 0.0010184


def test_chinchillas_outliers_move_the_fit_and_it_says_so(public_data, tmp_path, capsys):
    path = public_data("chinchilla/svg_extracted_data.csv")
    fit = fit_command(FitOptions(points=path, columns=CHINCHILLA, resamples=20, out=tmp_path))
    assert fit.values["E"] > 1.88
    assert fit.values["b"] > 0.44
    said = capsys.readouterr().out
    assert "losses 5.006, 4.665, 3.794, 3.766" in said
    assert "without them the fit moves: E 1.8914 -> 1.82" in said
    assert {file.name for file in tmp_path.iterdir()} == {
        *("fit.csv", "draws.csv", "residuals.csv", "isoflop.csv", "fit.png", "report.txt")
    }


@pytest.mark.parametrize("delta", [1e-3, 1.0])
@pytest.mark.parametrize("fitter", [fit_by_projection, fit_by_huber])
def test_a_known_law_is_found(fitter, delta):
    points = made_up(noise=1e-5)
    fit = fitter(points, LAWS["total"], delta)
    assert fit.values == pytest.approx(TRUTH, rel=0.02)
    assert np.abs(np.log(fit.predict(points.variables) / points.loss_P)).max() < 1e-4


def test_terms_may_share_an_exponent():
    """Krajewski's law: the exponent of the size stands in two terms."""
    values = {"E": 1.5, "A": 20.0, "G": 30.0, "B": 2000.0, "a": 0.2, "g": 0.6, "b": 0.37}
    points = made_up("granularity", values, noise=1e-6)
    fit = fit_by_projection(points, LAWS["granularity"], 1.0)
    assert fit.values == pytest.approx(values, rel=0.05)
    assert fit.objective <= 1.001 * fit_by_huber(points, LAWS["granularity"], 1.0).objective


def test_a_weight_counts_as_so_many_points():
    points = made_up(noise=0.01)
    twice = np.concatenate([np.arange(len(points)), np.arange(5)])
    weight_P = np.ones(len(points))
    weight_P[:5] = 2
    weighted = Points(variables=points.variables, loss_P=points.loss_P, weight_P=weight_P)
    assert fit_by_projection(weighted, LAWS["total"]).objective == pytest.approx(
        fit_by_projection(points.subset(twice), LAWS["total"]).objective, rel=1e-5
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = {"bootstrap": 0, "profile": 0}
    for seed in range(10):
        points = made_up(noise=0.004, sizes=5, seed=seed)
        fit = fit_by_projection(points, LAWS["total"], 1.0)
        draws_RV = bootstrap(points, fit, resamples=30, delta=1.0, seed=seed)
        for kind, interval in (
            ("bootstrap", percentiles(draws_RV[:, 0])),
            ("profile", profile(points, fit, "E", delta=1.0)),
        ):
            held[kind] += interval.low <= TRUTH["E"] <= interval.high
    assert held["profile"] >= 8
    assert held["bootstrap"] >= 7


def test_what_four_sizes_do_not_say_is_said(tmp_path, capsys):
    values = {"E": 0.8, "A": 10.0, "B": 2000.0, "a": 0.08, "b": 0.37}
    path = write(tmp_path / "points.csv", made_up(values=values, sizes=4, noise=0.003))
    fit_command(FitOptions(points=path, resamples=20))
    said = capsys.readouterr().out
    assert "E is not identified by 32 points with 4 values of total_params and 8 values of tokens" in said
    assert "the same minimum" in said


def test_the_last_row_of_a_run_is_its_point(tmp_path):
    points = made_up(noise=0.0)
    lines = ["run,total_params,tokens,loss"]
    for number, (size, tokens, loss) in enumerate(zip(*points.variables.values(), points.loss_P)):
        lines += [f"r{number},{size},{tokens / 2},{loss + 1}", f"r{number},{size},{tokens},{loss}"]
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    read = read_points(tmp_path / "curves.csv", Columns(run="run"), LAWS["total"])
    assert len(read) == len(points)
    np.testing.assert_allclose(read.loss_P, points.loss_P)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows below a header"),
        ("total_params,tokens,loss\n", "no rows below a header"),
        ("total_params,tokens\n1,2\n", "no column 'loss'; it has total_params, tokens"),
        ("total_params,tokens,loss\n1e6,1e7,nan\n", "line 2, column loss: 'nan' is no positive finite number"),
        ("total_params,tokens,loss\n1e6,1e7,3\n\n1e6,,3\n", "line 4, column tokens: '' is no positive finite number"),
        ("total_params,tokens,loss\n1e6,1e7,3\n", "1 points; the law 'total' has 5 parameters and needs at least 6"),
        (
            "total_params,tokens,loss\n" + "".join(f"1e6,{n}e7,{3 - n / 10}\n" for n in range(1, 9)),
            "1 distinct value of total_params; a power law beside a constant needs at least 3",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, said):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        fit_command(FitOptions(points=tmp_path / "points.csv"))


def test_an_unknown_law_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="--law totl: no such law; did you mean 'total'"):
        fit_command(FitOptions(points=__file__, law="totl"))


def test_isoflop_curves_are_written_with_their_parabolas(tmp_path):
    # Sizes at equal FLOPs, with noise enough that parabola and law differ.
    lines = ["total_params,tokens,loss"]
    for flops in (1e17, 4e17, 16e17):
        for size in np.geomspace(1e7, 8e8, 7):
            tokens = flops / (6 * size)
            lines.append(f"{size},{tokens},{1.7 + 400 * size**-0.34 + 400 * tokens**-0.28}")
    (tmp_path / "points.csv").write_text("\n".join(lines))
    fit_command(FitOptions(points=tmp_path / "points.csv", resamples=20, delta=1.0, out=tmp_path / "out"))
    rows = read_rows(tmp_path / "out" / "isoflop.csv", IsoflopRow)
    assert {row.kind for row in rows} == {"point", "law", "law optimum", "parabola", "parabola optimum"}
    for row in rows:
        assert 6 * row.params * row.tokens == pytest.approx(row.flops, rel=1e-3)
    of = {(row.flops, row.kind): row for row in rows}
    budgets = [flops for flops, kind in of if kind == "parabola optimum"]
    assert len(budgets) >= 2
    for flops in budgets:
        assert of[flops, "parabola optimum"].params == pytest.approx(of[flops, "law optimum"].params, rel=0.3)
