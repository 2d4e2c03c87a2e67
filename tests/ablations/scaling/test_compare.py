"""Differences of laws: known ones are found with intervals that hold, crossings too, bad tables refused."""

import numpy as np
import pytest

from ablations.scaling.compare import compare_command, fit_differences, read_pairs
from ablations.scaling.options import CompareOptions

SIZES = np.array([1e6, 3e6, 1e7, 3e7, 1e8])


def write(path, better_E=-0.02, better_A=0.0, noise=0.001, sizes=SIZES, seeds=2, seed=0):
    """Two laws with one exponent; the method's constant and factor differ."""
    generator = np.random.default_rng(seed)
    lines = ["method,scale,seed,loss"]
    for size in sizes:
        for number in range(seeds):
            shared = noise * generator.standard_normal()
            for name, constant, factor in (("baseline", 1.8, 40.0), ("top_p", 1.8 + better_E, 40.0 + better_A)):
                loss = constant + factor * size**-0.25 + shared + 0.5 * noise * generator.standard_normal()
                lines.append(f"{name},{size},{number},{loss}")
    path.write_text("\n".join(lines))
    return path


def test_a_constant_gain_stays(tmp_path, capsys):
    path = write(tmp_path / "ladder.csv")
    rows = compare_command(CompareOptions(method="top_p", points=path, seed_column="seed", out=tmp_path / "out"))
    assert [row.times for row in rows] == [1, 10, 100]
    assert all(row.low < -0.02 < row.high < 0 for row in rows)
    assert all(row.better > 0.99 for row in rows)
    said = capsys.readouterr().out
    assert "at 100x the largest size (1e+10)" in said
    assert "still better" in said
    assert "the laws do not cross up to 100x" in said
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("compare.csv", "curve.csv", "pairs.csv", "compare.png")
    }


def test_a_crossing_is_found(tmp_path, capsys):
    """+0.02 in the constant against a factor smaller by 3: equal where 3 x^-0.25 = 0.02, at 5.06e8."""
    path = write(tmp_path / "ladder.csv", better_E=0.02, better_A=-3.0, noise=0.0003, seeds=3)
    rows = compare_command(CompareOptions(method="top_p", points=path, seed_column="seed"))
    assert rows[0].high < 0 < rows[2].low
    said = capsys.readouterr().out
    crossing = float(said.split("cross at ")[1].split(",")[0])
    assert crossing == pytest.approx(5.06e8, rel=0.4)


def test_intervals_hold_the_truth_about_as_often_as_they_say(tmp_path):
    held = []
    for seed in range(30):
        path = write(tmp_path / "ladder.csv", noise=0.003, sizes=SIZES[1:], seeds=1, seed=seed)
        found = fit_differences(read_pairs(CompareOptions(method="top_p", points=path)), draws=300)
        low, high = np.quantile(found.at(10.0)[1], (0.025, 0.975))
        held.append(low < -0.02 < high)
    assert np.mean(held) > 0.85


@pytest.mark.parametrize(
    ("options", "sizes", "said"),
    [
        ({}, SIZES, "a second row of 'baseline' at scale 1e[+]06; name the column of seeds"),
        ({"seed_column": "seed"}, SIZES[:3], "meet at 3 sizes; a difference of laws needs at least 4"),
        ({"baseline": "other"}, SIZES, "no row of 'other'; it has baseline, top_p"),
        ({"scale_column": "params"}, SIZES, "no column 'params'"),
        ({"baseline": "top_p"}, SIZES, "top_p is the baseline"),
    ],
)
def test_bad_tables_are_refused(tmp_path, options, sizes, said):
    path = write(tmp_path / "ladder.csv", sizes=sizes)
    with pytest.raises(ValueError, match=said):
        compare_command(CompareOptions(method="top_p", points=path, **options))
