"""The table from synthetic records: means, pairing, verdicts, footnotes, csv."""

import csv
import statistics

import pytest

from ablations.comparison.records import read_records
from ablations.comparison.statistics import BETTER, NO_VERDICT, NOT_SEPARABLE, REFERENCE, WORSE
from ablations.report import report, table
from ablations.report.table import COLUMNS, SHOWN, Column, footnotes, table_rows, table_text, with_unit, write_csv


def test_rows_are_means_over_runs_and_differences_are_paired(comparison_folder):
    records = read_records(comparison_folder)
    rows = {row.method: row for row in table_rows(records)}
    assert list(rows) == ["baseline", "no_op", "top_p", "null_experts", "random_k"]
    losses = {m: [records.results[m][0, seed].bits_per_byte for seed in (0, 1, 2)] for m in rows}
    for method, row in rows.items():
        assert row.bits_per_byte.mean == pytest.approx(statistics.fmean(losses[method]))
        assert (row.runs, row.bits_per_byte.n) == (3, 3)
    difference = rows["top_p"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(
        statistics.fmean(a - b for a, b in zip(losses["top_p"], losses["baseline"]))
    )
    # The seeds' common deviation (0.01) is much larger than what is left after pairing (0.002).
    assert difference.half_width is not None
    assert rows["top_p"].bits_per_byte.half_width is not None
    assert difference.half_width < rows["top_p"].bits_per_byte.half_width / 2
    # 10,000 tokens per step at 0.02 s.
    assert rows["baseline"].tokens_per_second == pytest.approx(500_000)


def test_verdicts_of_large_effects_and_of_none(comparison_folder):
    verdicts = {row.method: row.verdict for row in table_rows(read_records(comparison_folder))}
    assert verdicts["baseline"] == REFERENCE
    assert verdicts["no_op"] == NOT_SEPARABLE
    assert verdicts["top_p"] == BETTER
    assert verdicts["random_k"] == WORSE


def test_text_holds_every_column_the_noise_and_xz(comparison_folder):
    text = table_text(read_records(comparison_folder))
    headings = ["method", "bits/byte", "difference", "verdict", "experts", "active", "FLOPs/token"]
    assert [column.heading for column in SHOWN] == [*headings, "KV/token 4K", "KV/token 64K", "tokens/s"]
    for column in SHOWN:
        assert column.heading is not None
        assert column.heading in text
    assert "xz -9, same text" in text
    assert "1.7000" in text
    assert "not trunk noise" in text
    assert "in block 7, the part above the frozen boundary" in text
    assert "its data order differs too" in text
    assert "cost ledger" in text


def test_csv_holds_the_rows_in_full_precision(comparison_folder, tmp_path):
    records = read_records(comparison_folder)
    write_csv(records, tmp_path / "table.csv")
    assert b"\r" not in (tmp_path / "table.csv").read_bytes()
    read = list(csv.DictReader((tmp_path / "table.csv").open()))
    for line, row in zip(read, table_rows(records), strict=True):
        assert line["method"] == row.method
        assert float(line["bits_per_byte"]) == row.bits_per_byte.mean
        assert line["verdict"] == row.verdict
        assert line["difference"] == ("" if row.difference is None else repr(row.difference.mean))
        used = [result.mean_experts for result in records.results[row.method].values()]
        assert float(line["mean_experts"]) == statistics.fmean(used)


def test_a_column_is_declared_in_one_place(comparison_folder, tmp_path, monkeypatch):
    """A column added to the list stands in the csv, in the text and in the report, in the place it has in the list."""
    total = Column(
        name="total_parameters",
        value=lambda row: row.mean("total_parameters"),
        heading="all weights",
        text=lambda row: with_unit(row.mean("total_parameters")),
    )
    hidden = Column(name="budget_tokens", value=lambda row: row.mean("budget_tokens"))
    monkeypatch.setattr(table, "COLUMNS", (*COLUMNS[:2], total, hidden, *COLUMNS[2:]))
    for module in (table, report):
        monkeypatch.setattr(module, "SHOWN", (SHOWN[0], total, *SHOWN[1:]))
    records = read_records(comparison_folder)
    write_csv(records, tmp_path / "table.csv")
    header, first, *_ = csv.reader((tmp_path / "table.csv").open())
    assert header[:5] == ["method", "runs", "total_parameters", "budget_tokens", "bits_per_byte"]
    assert first[:4] == ["baseline", "3", "9000000.0", "8192.0"]
    lines = table_text(records).splitlines()
    assert lines[0].split()[:3] == ["method", "all", "weights"]
    assert lines[2].split()[:3] == ["baseline", "9", "M"]
    shown = report.table(records, table_rows(records))
    assert "<th>method</th><th>all weights</th><th>bits/byte</th>" in shown
    assert shown.count('<td data-label="all weights">9 M</td>') == 5
    assert "budget_tokens" not in shown


def test_several_trunks_say_which_noise_they_hold(write_synthetic):
    records = read_records(write_synthetic(trunk_seeds=(0, 1, 2), branch_seeds=(0, 1)))
    rows = table_rows(records)
    assert rows[0].runs == 6
    assert rows[0].bits_per_byte.n == 3
    assert "hold trunk noise" in " ".join(footnotes(records))


def test_one_seed_earns_no_verdict(write_synthetic):
    rows = table_rows(read_records(write_synthetic(branch_seeds=(0,))))
    assert {row.verdict for row in rows[1:]} == {NO_VERDICT}
    assert all(row.bits_per_byte.half_width is None for row in rows)


def test_unfinished_runs_are_left_out_and_named(write_synthetic):
    folder = write_synthetic()
    (folder / "../../branches/top_p_0_2/result.json").unlink()
    for seed in range(3):
        (folder / f"../../branches/random_k_0_{seed}/result.json").unlink()
    records = read_records(folder)
    rows = {row.method: row for row in table_rows(records)}
    assert rows["top_p"].runs == 2
    assert "random_k" not in rows
    assert "top_p 2 of 3, random_k 0 of 3" in " ".join(footnotes(records))


def test_a_folder_that_is_none_is_refused(tmp_path, write_synthetic):
    with pytest.raises(ValueError, match=r"no comparison\.json"):
        read_records(tmp_path)
    folder = write_synthetic()
    for seed in range(3):
        (folder / f"../../branches/baseline_0_{seed}/result.json").unlink()
    with pytest.raises(ValueError, match="no finished branch of 'baseline'"):
        read_records(folder)


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.5, "0.5 "), (999.6, "1 k"), (1234, "1.23 k"), (9.996e5, "1 M"), (2.5e9, "2.5 G"), (8.5e13, "85 T")],
)
def test_units(number, shown):
    assert with_unit(number) == shown
