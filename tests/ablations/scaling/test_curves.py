"""Laws of the loss at every step: schedules by hand, known laws found, the published split, bad curves refused."""

import numpy as np
import pytest

from ablations.scaling.curves import curves_command
from ablations.scaling.options import CurvesOptions
from ablations.scaling.schedule_laws import SCHEDULE_LAWS, Curve, ScheduleFit, fit_curves
from ablations.scaling.schedules import Schedule, from_rows, warmup_cosine

FITTED = ("cosine_24000", "constant_24000", "wsdcon_9")
TESTED = ("cosine_72000", "constant_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
# By name of a law: outer parameters, and the linear ones.
KNOWN = {
    "momentum": {"L0": 3.0, "A": 0.9, "B": 0.1, "alpha": 0.5, "log_rate": 0.5},
    "multi_power": {"L0": 3.0, "A": 0.9, "B": 0.1, "alpha": 0.5, "log_c": 1.0, "beta": 0.6, "gamma": 0.5},
    "relaxation": {"L0": 3.0, "A": 0.9, "alpha": 0.5, "log_c": 1.0, "B": 0.04},
}


def test_the_area_of_a_schedule_is_its_integral():
    schedule = Schedule(at_K=np.array([0.0, 100.0, 200.0, 200.0, 400.0]), rate_K=np.array([0.0, 1.0, 1.0, 0.5, 0.0]))
    np.testing.assert_allclose(
        schedule.area(np.array([0.0, 50.0, 100.0, 200.0, 300.0, 400.0])), [0, 12.5, 50, 150, 187.5, 200]
    )
    falls = schedule.falls(np.array([100.0, 200.0, 400.0]))
    np.testing.assert_allclose(falls.size_J, [0.5, 0.5])
    np.testing.assert_allclose(falls.rate_J, [0.5, 1e-3])
    np.testing.assert_allclose(falls.area_PJ, [[0, 0], [0, 0], [50, 25]])
    np.testing.assert_allclose(falls.since_PJ[2], [200, 100])


def test_a_cosine_falls_from_one_to_its_floor():
    schedule = warmup_cosine(1000.0, 100.0, 0.1)
    assert schedule.falls(np.array([1000.0])).size_J.sum() == pytest.approx(0.9)
    assert schedule.area(np.array([1000.0]))[0] == pytest.approx(50 + 900 * 0.55, rel=1e-3)


def test_a_recorded_step_of_the_rate_stays_a_step():
    schedule = from_rows(np.array([10.0, 20, 30, 40]), np.array([2.0, 2, 0.5, 0.45]), 0.0, 2.0)
    falls = schedule.falls(np.array([40.0]))
    np.testing.assert_allclose(falls.size_J, [0.75, 0.025])
    np.testing.assert_allclose(falls.since_PJ, [[10, 5]])


def made_up(law, values):
    """A constant, a cosine and a stepped curve of a known law."""
    step_P = np.linspace(500, 12000, 90)
    cosine = warmup_cosine(12000.0, 400.0, 0.1)
    constant = Schedule(at_K=np.array([0.0, 400, 12000]), rate_K=np.array([0.0, 1, 1]))
    step = Schedule(at_K=np.array([0.0, 400, 5000, 5000, 12000]), rate_K=np.array([0.0, 1, 1, 0.3, 0.3]))
    fit = ScheduleFit(law=SCHEDULE_LAWS[law], values=values, objective=0.0)
    curves = []
    for name, schedule in (("cosine", cosine), ("constant", constant), ("step", step)):
        blank = Curve(name=name, step_P=step_P, loss_P=np.ones(len(step_P)), schedule=schedule)
        curves.append(Curve(name=name, step_P=step_P, loss_P=fit.predict(blank), schedule=schedule))
    return curves


@pytest.mark.parametrize("law", SCHEDULE_LAWS)
def test_a_known_law_is_found(law):
    curves = made_up(law, KNOWN[law])
    fit = fit_curves(curves, SCHEDULE_LAWS[law], 1.0)
    for curve in curves:
        assert np.abs(fit.predict(curve) - curve.loss_P).max() < 1e-4
    assert fit.values["L0"] == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(("size", "published"), [("25M", 0.0038), ("100M", 0.0044)])
def test_the_published_split_of_the_multi_power_law(public_data, size, published, tmp_path, capsys):
    """Luo 2025 (arXiv 2503.12811): fitted on three curves, mean absolute error of the other six."""
    files = {name: public_data(f"mpl_curves/{size}_{name}.csv") for name in (*FITTED, *TESTED)}
    rows = curves_command(
        CurvesOptions(
            curves=tuple(files[name] for name in FITTED),
            test=tuple(files[name] for name in TESTED),
            warmup=2160,
            out=tmp_path,
        )
    )
    assert np.mean([row.mean_absolute for row in rows if row.part == "test"]) <= published
    assert np.mean([row.r_squared for row in rows if row.part == "test"]) >= 0.998
    assert "over 6 curves" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"values.csv", "errors.csv", "curves.csv", "curves.png"}


ROWS = "".join(f"{step},{0.1 if step < 50 else 0.01},{4 - step / 100}\n" for step in range(10, 120, 10))


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("step,loss\n10,3\n", {}, r"no column 'lr' of learning rates, without which .* it has step, loss"),
        ("step,lr,loss\n10,0.1,nan\n", {}, "line 2, column loss: 'nan' is no positive finite number"),
        ("step,lr,loss\n10,0.1,3\n", {}, "1 rows; a curve needs at least 10"),
        (f"step,lr,loss\n{ROWS}10,0.1,3\n", {}, "line 13, column step: steps must rise"),
        (f"step,lr,loss\n{ROWS}".replace("0.01", "0.1"), {}, "falls in none of the curves"),
        (f"step,lr,loss\n{ROWS}", {"law": "relax"}, "did you mean 'relaxation'"),
    ],
)
def test_bad_curves_are_refused(tmp_path, text, options, said):
    (tmp_path / "curve.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        curves_command(CurvesOptions(curves=(tmp_path / "curve.csv",), **options))
