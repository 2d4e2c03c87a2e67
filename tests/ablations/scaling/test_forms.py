"""Laws of mixtures of experts on made-up ladders whose law is known, and intervals of what a ladder says of larger
runs."""

import dataclasses
import math

import numpy as np
import pytest

from ablations.scaling.compare_forms import (
    FIGURE_FILE,
    FORMS_FILE,
    HELD_FILE,
    PARAMETERS_FILE,
    REPORT_FILE,
    RESIDUALS_FILE,
    forms_command,
    read_runs,
)
from ablations.scaling.forms import LAWS, derived, find_law
from ablations.scaling.ladder import PointRow
from ablations.scaling.ladder_intervals import DELTA, ladder_tests, leverage, points_of, predictions
from ablations.scaling.options import FormsOptions
from ablations.scaling.variable_projection import fit_by_projection
from foundation.tables import read_rows, write_rows

SIZES = ((4e5, 12, 80), (8e5, 12, 80), (1.6e6, 12, 80), (8e5, 12, 20), (8e5, 12, 40), (8e5, 4, 80))


def ladder(loss, *, budgets=(6e4, 12e4, 24e4), noise=0.002, seed=0):
    """Sizes at every budget with losses of a law; the three of most FLOPs are held out.

    Args:
        loss: of a row without it.
    """
    noisy = np.random.default_rng(seed)
    rows = []
    for budget in budgets:
        for active, k, experts in SIZES:
            total = active * (1 + experts / 40)
            row = PointRow(
                run=f"n{active:g}_k{k}_e{experts}_t{budget:g}",
                method="baseline",
                held_out=0,
                total_params=total,
                active_params=active * (1 + k / 60),
                tokens=int(budget),
                experts=experts,
                granularity=32.0,
                density=k / experts,
                flops=6.3 * active * (1 + k / 60) * budget,
                seconds=1.0,
                scale=1.0,
                loss=1.0,
            )
            rows.append(dataclasses.replace(row, loss=loss(row) * math.exp(noise * noisy.standard_normal())))
    rows.sort(key=lambda row: row.flops)
    return [dataclasses.replace(row, held_out=int(index >= len(rows) - 3)) for index, row in enumerate(rows)]


def routed(row):
    """Clark's: what experts gain grows as models shrink."""
    log_n, log_e = math.log(row.active_params), math.log(row.experts)
    return 1.2 + math.exp(3.3 - 0.30 * log_n - 0.25 * log_e + 0.012 * log_n * log_e) + 60 * row.tokens**-0.4


def test_variables_are_made_of_columns():
    columns = {"flops": [6e10], "tokens": [1e4], "active_params": [1e6], "experts": [80.0]}

    def column(name):
        return np.array(columns[name])

    assert derived("flops_per_token", column) == pytest.approx([6e6])
    assert np.log(derived("interaction", column)) == pytest.approx([-math.log(1e6) * math.log(80) / 10])
    assert derived("tokens", column) == pytest.approx([1e4])


def test_clarks_law_is_found_again():
    rows = ladder(routed, noise=0.0)
    fit = fit_by_projection(points_of(rows, find_law("routed")), find_law("routed"), DELTA)
    for row, value in zip(rows, fit.predict(points_of(rows, find_law("routed")).variables)):
        assert value == pytest.approx(row.loss, rel=3e-4)
    assert fit.values["c"] == pytest.approx(0.12, abs=0.1)


def gaining(row):
    """What a model gains by experts is a power of their number."""
    return 1.2 + 80 * row.active_params**-0.3 * row.experts**-0.12 + 60 * row.tokens**-0.4


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    write_rows(folder / "points.csv", PointRow, ladder(gaining))
    options = FormsOptions(
        points=folder / "points.csv", laws=("active", "experts", "granularity"), resamples=20, out=folder / "out"
    )
    return options, forms_command(options)


def test_the_true_form_predicts_best(compared):
    options, forms = compared
    by_law = {row.law: row for row in forms}
    # One granularity tells no power of it.
    assert by_law.keys() == {"active", "experts"}
    assert by_law["experts"].left_out < 0.7 * by_law["active"].left_out
    assert by_law["experts"].fitted == pytest.approx(0.2, abs=0.12)
    assert read_runs(options.points) == read_rows(options.points, PointRow)


def test_everything_is_written_and_what_cannot_be_fitted_is_said(compared):
    options, _ = compared
    for name in (FORMS_FILE, PARAMETERS_FILE, HELD_FILE, RESIDUALS_FILE, FIGURE_FILE):
        assert (options.out / name).stat().st_size > 100
    said = (options.out / REPORT_FILE).read_text()
    assert "granularity: not fitted" in said
    assert "1 distinct value of granularity; a power law beside a constant needs at least 3" in said
    assert "E is not identified by 15 points" in said
    with pytest.raises(ValueError, match="no law can be fitted"):
        forms_command(dataclasses.replace(options, laws=("granularity",), out=None))


def test_every_law_names_columns_that_a_ladder_has():
    rows = ladder(routed)
    for law in LAWS.values():
        assert all(len(values) == len(rows) for values in points_of(rows, law).variables.values())


def bent(row):
    """A law that none of ours is: tokens count as tokens per parameter, and models learn in a bend."""
    ratio = row.tokens / row.active_params
    return 1.5 + 8 * row.active_params**-0.15 * (1 + ratio**0.5) ** -1.0


def test_back_tests_widen_intervals_where_the_law_is_wrong():
    rows, law = ladder(bent, noise=0.001), find_law("active")
    used, held = [row for row in rows if not row.held_out], [row for row in rows if row.held_out]
    fit = fit_by_projection(points_of(used, law), law, DELTA)
    tests = ladder_tests(used, law, fit)
    assert len(tests) == len(used) - len(law.parameters) - 2 or tests
    assert all(test.fitted >= len(law.parameters) + 2 for test in tests)
    found = predictions(used, held, law, 20)
    for row, run in zip(found, held):
        assert row.back_tests == len(tests)
        assert row.low_90 < run.loss < row.high_90, (row, run.loss)


def test_intervals_stay_narrow_where_the_law_is_right():
    law = find_law("active")
    rows = ladder(lambda row: 1.5 + 400 * row.active_params**-0.5 + 90 * row.tokens**-0.45, noise=0.001)
    used, held = [row for row in rows if not row.held_out], [row for row in rows if row.held_out]
    for row, run in zip(predictions(used, held, law, 20), held):
        assert row.low_90 < run.loss < row.high_90
        assert row.high_90 / row.low_90 < 1.05


def test_leverage_grows_with_the_distance():
    flops = [1e10, 2e10, 4e10]
    assert leverage(flops, 2e10) == pytest.approx(1 / 3)
    assert leverage(flops, 16e10) > leverage(flops, 8e10) > 1
