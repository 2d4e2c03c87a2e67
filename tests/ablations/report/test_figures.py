"""Figures: what is drawn is what the csv says, labels do not overlap, curves are averaged as described."""

import csv
import math
from itertools import groupby, pairwise

import matplotlib.colors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablations.comparison.records import read_records
from ablations.report.figures import all_figures, band, curve
from ablations.report.style import DARK, SERIES, VARIABLES, looks, spread, svg
from foundation.tables import write_table


@pytest.fixture(scope="module")
def figures(comparison_folder):
    return {figure.name: figure for figure in all_figures(read_records(comparison_folder))}


def read_back(figure, path):
    """The rows of the figure's csv, numbers as numbers."""
    write_table(path, figure.columns, figure.rows)
    with path.open() as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == figure.columns

    def value(text):
        try:
            return float(text) if text else None
        except ValueError:
            return text

    return [tuple(value(cell) for cell in row) for row in rows]


@pytest.mark.parametrize("name", ["loss_curves", "loss_against_experts"])
def test_lines_and_bands_are_the_csv(figures, name, tmp_path):
    rows = read_back(figures[name], tmp_path / "data.csv")
    (axes,) = figures[name].draw(rows).axes
    held_against(axes, {key: list(group) for key, group in groupby(rows, key=lambda row: row[0])})


def held_against(axes, groups):
    """Lines and bands of a panel are the rows (series, x, mean, low, high) of its groups."""
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(lines) == len(axes.collections) == len(groups) >= 3
    for line, filled, group in zip(lines, axes.collections, groups.values()):
        assert list(line.get_xdata()) == [row[1] for row in group]
        assert list(line.get_ydata()) == [row[2] for row in group]
        outline = filled.get_paths()[0].vertices
        assert {(row[1], row[3]) for row in group} | {(row[1], row[4]) for row in group} <= {
            tuple(vertex) for vertex in outline
        }


@pytest.mark.parametrize("name", ["validation_curves", "branch_differences"])
def test_lines_of_single_runs_and_their_means_are_the_csv(figures, name, tmp_path):
    rows = read_back(figures[name], tmp_path / "data.csv")
    (axes,) = figures[name].draw(rows).axes
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row[:2])]
    lines = [line for line in axes.lines if list(line.get_xdata()) not in ([0, 1], [axes.lines[-1].get_xdata()[0]] * 2)]
    assert [list(line.get_ydata()) for line in lines] == [[row[3] for row in group] for group in groups]
    runs = {row[1] for row in rows if row[0] == "top_p"}
    assert runs == {"mean", "trunk 0 seed 0", "trunk 0 seed 1", "trunk 0 seed 2"}
    widths = {row[1]: line.get_linewidth() for line, (row, *_) in zip(lines, groups) if row[0] == "top_p"}
    assert all(widths[run] < widths["mean"] for run in runs - {"mean"})


def test_validation_ends_where_the_table_stands(figures, comparison_folder):
    records = read_records(comparison_folder)
    rows = figures["validation_curves"].rows
    ends = {row[0]: row[3] for row in rows if row[1] == "mean"}
    for method in records.methods:
        table = sum(run.bits_per_byte for run in records.branches[method].values()) / 3
        assert ends[method] == pytest.approx(table)
    assert ends["trunk"] == pytest.approx(records.trunks[0].bits_per_byte)


def test_budgets_stand_on_the_level_of_the_table(figures, comparison_folder):
    """What a budget costs was measured on some batches; the level is that of the whole text."""
    records = read_records(comparison_folder)
    at_own = {row[0]: row[2] for row in figures["loss_against_experts"].rows if row[1] == 12}
    own = sum(result.bits_per_byte for result in records.results["baseline"].values()) / 3
    assert at_own["baseline"] == pytest.approx(own)


def test_the_caption_says_which_text_the_budgets_were_measured_on(figures):
    # Batches spaced evenly through the text (`measure.spaced_batches`), not its first tokens.
    assert "8,192 tokens of the validation text, in batches spaced evenly through it" in (
        figures["loss_against_experts"].caption
    )


def test_difference_marks_are_the_csv(figures, tmp_path):
    rows = read_back(figures["differences"], tmp_path / "data.csv")
    panels = figures["differences"].draw(rows).axes
    # What is not paired scatters ten times as far: it has a scale of its own.
    names = ["methods, paired by seed", "another order of the data, not paired"]
    grouped = [(name, [row for row in rows if row[0] == name]) for name in names]
    assert {row[1] for row in grouped[1][1]} == {"other_order"}
    for axes, (name, own) in zip(panels, grouped, strict=True):
        assert axes.get_title(loc="left") == name
        means = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        assert means == [row[3] for row in own if row[2] == "mean"]
        bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
        assert bars[1:] == [(row[4], row[5]) for row in own if row[2] == "mean"]
        single = [point[0] for dots in axes.collections for point in dots.get_offsets()]
        assert single == [row[3] for row in own if row[2] != "mean"]
        assert len(single) == 3 * len(means)


def test_another_order_is_not_subtracted_batch_by_batch(figures):
    assert {row[0] for row in figures["branch_differences"].rows} == {"twin", "top_p", "null_experts", "random_k"}


def test_histogram_bars_are_the_csv_and_sum_to_one(figures, tmp_path):
    rows = read_back(figures["experts_per_token"], tmp_path / "data.csv")
    panels = figures["experts_per_token"].draw(rows).axes
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row[0])]
    for axes, group in zip(panels, groups, strict=True):
        assert [patch.get_height() for patch in axes.patches] == [share for _, _, share in group]
        assert sum(share for _, _, share in group) == pytest.approx(1)


def test_router_lines_are_the_csv_of_the_whole_run(figures, comparison_folder, tmp_path):
    rows = read_back(figures["routers"], tmp_path / "data.csv")
    panels = figures["routers"].draw(rows).axes
    grouped = [(name, list(group)) for name, group in groupby(rows, key=lambda row: row[0])]
    assert [name for name, _ in grouped] == ["experts per token", "dead experts", "entropy, nats"]
    methods = read_records(comparison_folder).methods
    for axes, (name, own) in zip(panels, grouped, strict=True):
        assert axes.get_title(loc="left") == name
        groups = {key: [row[1:] for row in group] for key, group in groupby(own, key=lambda row: row[1])}
        assert list(groups) == ["trunk", *methods]
        assert [list(line.get_ydata()) for line in axes.lines] == [[row[2] for row in g] for g in groups.values()]
    experts = grouped[0][1]
    # 800 steps of the trunk and 200 of a branch, at both lines that each has written.
    assert [row[2] for row in experts if row[1] == "trunk"] == [4_000_000, 8_000_000]
    assert [row[2] for row in experts if row[1] == "top_p"] == [9_000_000, 10_000_000]
    assert [row[3] for row in experts if row[1] == "trunk"] == pytest.approx([12.4, 12.8])


def test_runs_without_diagnostics_have_no_such_figure(write_synthetic):
    folder = write_synthetic()
    for path in folder.parents[1].rglob("diagnostics.jsonl"):
        path.unlink()
    assert "routers" not in {figure.name for figure in all_figures(read_records(folder))}


def test_cost_bars_are_the_csv(figures, tmp_path):
    rows = read_back(figures["costs"], tmp_path / "data.csv")
    (axes,) = figures["costs"].draw(rows).axes
    expected = []
    for _, group in groupby(rows, key=lambda row: row[0]):
        parts = [row[2] for row in group]
        expected += [sum(parts), *parts]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx(expected)


def test_curves_are_in_bits_per_byte_of_the_tokens_seen(comparison_folder):
    records = read_records(comparison_folder)
    run = records.trunks[0]
    points = curve(run, records.comparison, offset=5)
    assert points[0] == (10_005, pytest.approx(run.losses[0] / math.log(2) / 3.6))
    assert len(points) == len(run.losses) == 800


def test_band_averages_pieces_of_the_steps_all_have():
    curves = [[(step, float(step)) for step in range(1, 101)], [(step, step + 2.0) for step in range(1, 99)]]
    rows = band(curves, 49)
    # 98 common steps in 49 pieces: the first holds steps 1 and 2, the last 97 and 98.
    assert len(rows) == 49
    assert rows[0] == (2, 2.5, 1.5, 3.5)
    assert rows[-1] == (98, 98.5, 97.5, 99.5)
    # More pieces than steps: one step each; a number that does not divide: pieces whose sizes differ by one at most.
    assert len(band(curves, 1000)) == 98
    assert [row[0] for row in band(curves, 5)] == [19, 39, 58, 78, 98]
    assert band([], 33) == []


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_spread_labels_keep_order_and_distance(values):
    places = spread(values, 0.5)
    ordered = [place for _, place in sorted(zip(values, places))]
    assert all(b - a >= 0.5 - 1e-9 for a, b in pairwise(ordered))
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)


def test_labels_that_do_not_touch_stay_where_they_are():
    assert spread([3.0, 1.0, 2.0], 0.5) == [3.0, 1.0, 2.0]


def test_every_colour_has_a_dark_partner_and_series_differ_in_lightness_of_their_background():
    assert set(VARIABLES.values()) == set(DARK)

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    # WCAG's ratio for graphics, 3:1, on white and on the dark page.
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in SERIES)
    assert all((luminance(DARK[VARIABLES[colour]]) + 0.05) / (luminance("#14171b") + 0.05) >= 3 for colour in SERIES)


def test_methods_keep_their_look_and_differ_without_colour():
    named = looks(["baseline", "other_order", "a", "b", "c", "d"])
    assert named["a"] == looks(["", "a", "b"])["a"]
    lines = [named[name] for name in ("baseline", "a", "b", "c", "d")]
    assert len({look.colour for look in lines}) == 5
    # To eyes that see no colour, and in print.
    assert len({str(look.dash) for look in lines}) == 5
    assert len({look.marker for look in lines}) == 5


def test_svg_follows_the_theme_and_refers_to_nothing_outside(figures):
    for figure in figures.values():
        text = svg(lambda figure=figure: figure.draw(figure.rows), figure.title)
        assert text.startswith("<svg viewBox=")
        assert "var(--ink)" in text or "var(--muted)" in text
        assert "http" not in text
        assert "font-family" not in text
        assert not any(colour in text for colour in VARIABLES)
