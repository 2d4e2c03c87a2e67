"""A plan is the optimum that the law has in closed form, with the spread of its draws."""

import numpy as np
import pytest

from ablations.scaling.fit import fit_command
from ablations.scaling.options import FitOptions, PlanOptions
from ablations.scaling.plan import plan_command
from tests.ablations.scaling.test_fit import TRUTH, made_up, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("fit")
    path = write(root / "points.csv", made_up(noise=0.003))
    fit_command(FitOptions(points=path, resamples=40, delta=1.0, out=root / "fit"))
    return root / "fit"


def test_the_plan_is_the_closed_form(folder, tmp_path, capsys):
    flops = 1e20
    (row,) = plan_command(PlanOptions(fit=folder, flops=(flops,), csv=tmp_path / "plan.csv"))
    a, b = TRUTH["a"], TRUTH["b"]
    best = ((a * TRUTH["A"]) / (b * TRUTH["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))
    assert row.params == pytest.approx(best, rel=0.2)
    assert row.params_low < best < row.params_high
    assert 6 * row.params * row.tokens == pytest.approx(flops)
    assert row.params_from < row.params < row.params_to
    assert (tmp_path / "plan.csv").read_text().count("\n") == 2
    assert "1e+20 FLOP" in capsys.readouterr().out


def test_batches_are_a_share_of_the_noise_scale(folder, tmp_path, capsys):
    (tmp_path / "noise.csv").write_text("noise_tokens,loss\n50000,3.25\n")
    options = PlanOptions(fit=folder, flops=(1e20,), noise=tmp_path / "noise.csv", waste=0.2)
    (row,) = plan_command(options)
    assert row.batch_tokens == pytest.approx(10_000)
    assert row.steps == pytest.approx(row.tokens / 10_000)
    said = capsys.readouterr().out
    assert "steps of 10,000 tokens" in said
    assert "batches cost 20% more tokens than the least, by the noise scale of 50,000 tokens" in said


def test_seconds_are_flops(folder):
    (row,) = plan_command(PlanOptions(fit=folder, seconds=(1000.0,), flops_per_second=1e17))
    assert row.flops == pytest.approx(1e20)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs either --flops or --seconds"),
        ({"flops": (1e9,), "seconds": (1.0,)}, "needs either --flops or --seconds"),
        ({"seconds": (1.0,)}, "need each other"),
        ({"flops": (np.nan,)}, "PlanOptions.flops: nan, must be a positive finite number"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        PlanOptions(fit=tmp_path, **options)


def test_a_folder_without_a_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no fit\.csv; name a folder"):
        plan_command(PlanOptions(fit=tmp_path, flops=(1e20,)))
