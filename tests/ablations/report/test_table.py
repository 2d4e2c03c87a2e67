"""The table from synthetic records: means, pairing, verdicts, footnotes, csv."""

import csv
import dataclasses
import json
import math
import re
import statistics

import pytest

from ablations.comparison import verdicts
from ablations.comparison.records import read_records
from ablations.comparison.statistics import Noise
from ablations.comparison.verdicts import controls_statement, outcomes, would_see
from ablations.report import report, table
from ablations.report.domains import bits_by_domain, domain_table
from ablations.report.table import (
    COLUMNS,
    SHOWN,
    Column,
    footnotes,
    table_rows,
    table_text,
    unequal_budgets,
    with_unit,
    write_csv,
)
from foundation.tables import read_rows, write_rows
from staged_training.record import SectionLoss


def test_rows_are_means_over_runs_and_differences_are_paired(comparison_folder):
    records = read_records(comparison_folder)
    rows = {row.method: row for row in table_rows(records)}
    assert list(rows) == ["baseline", "twin", "other_order", "top_p", "null_experts", "random_k"]
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


def test_verdicts_of_large_effects_and_of_none(comparison_folder):
    rows = {row.method: row for row in table_rows(read_records(comparison_folder))}
    verdicts = {method: row.verdict for method, row in rows.items()}
    limit = rows["null_experts"].outcome.detectable
    assert limit is not None
    assert 0.001 < limit < 0.02
    assert verdicts == {
        "baseline": "reference",
        "twin": "within noise on this trunk",
        "other_order": "within noise on this trunk",
        "top_p": "better on this trunk",
        "null_experts": f"smaller than {limit:.4f} on this trunk",
        "random_k": "worse on this trunk",
    }


def test_the_noise_of_the_text_is_in_the_interval(comparison_folder):
    """Each section scatters by 0.02 bits per byte in every run: of 400 of them, paired, 0.0014 in a mean of two."""
    records = read_records(comparison_folder)
    difference = outcomes(records)["top_p"].difference
    assert difference is not None
    seeds = [
        records.results["top_p"][0, s].bits_per_byte - records.results["baseline"][0, s].bits_per_byte for s in range(3)
    ]
    assert difference.runs == Noise(variance=pytest.approx(statistics.variance(seeds) / 3), freedom=2)
    assert difference.text.variance > 0
    assert difference.half_width() >= difference.runs.half_width(0.05)


def test_a_verdict_that_the_fork_may_have_made_is_withheld(write_synthetic):
    """Null columns that take the weight at the first step: the branch recovers, and what is left says nothing."""
    folder = write_synthetic()
    for seed in range(3):
        path = folder / f"../../branches/random_k_0_{seed}/metrics.jsonl"
        first, *others = path.read_text().splitlines()
        record = json.loads(first)
        # 0.25 nats per token of 3.6 bytes are 0.1 bits per byte.
        record["loss"] += 0.1 * 3.6 * math.log(2)
        path.write_text("\n".join([json.dumps(record), *others]) + "\n")
    row = next(row for row in table_rows(read_records(folder)) if row.method == "random_k")
    assert row.outcome.fork_shock == pytest.approx(0.1, abs=0.001)
    assert row.verdict == "withheld: the fork itself moved the loss by +0.100 on this trunk"
    assert row.outcome.kind == "withheld"
    assert "random_k is withheld because the fork moved the loss" in report.headline(
        read_records(folder), table_rows(read_records(folder))
    )


def known_to_be(records, **known):
    methods = tuple(dataclasses.replace(m, known=known.get(m.name)) for m in records.comparison.methods)
    return dataclasses.replace(records, comparison=dataclasses.replace(records.comparison, methods=methods))


def test_a_run_says_whether_it_saw_its_controls(comparison_folder):
    records = read_records(comparison_folder)
    assert controls_statement(records) is None
    both = known_to_be(records, random_k="worse", top_p="better")
    # Of known sign: the fork is part of the effect, and withholds nothing.
    shocked = {
        key: dataclasses.replace(run, losses=[9.0, *run.losses[1:]]) for key, run in both.branches["random_k"].items()
    }
    both = dataclasses.replace(both, branches={**both.branches, "random_k": shocked})
    found = outcomes(both)
    assert (found["random_k"].kind, found["random_k"].words) == ("control", "worse as known on this trunk")
    shock, difference = found["random_k"].fork_shock, found["random_k"].difference
    assert shock is not None
    assert difference is not None
    assert shock > abs(difference.mean)
    assert controls_statement(both) == "Both controls came out as known: top_p better, random_k worse."
    assert controls_statement(both) in footnotes(both)
    # One method is left to be judged, and to be corrected for.
    assert [method for method, outcome in found.items() if outcome.kind not in ("control", "reference")] == [
        "null_experts"
    ]
    blind = controls_statement(known_to_be(records, null_experts="better", top_p="worse"))
    assert blind is not None
    assert blind.startswith("The run could not see its own controls")
    assert "top_p came out better: known to be worse" in blind
    assert "null_experts not seen: known to be better" in blind


def test_verdicts_are_corrected_for_the_methods_of_the_table(write_synthetic, monkeypatch):
    records = read_records(write_synthetic())
    alone = dataclasses.replace(records, results={m: records.results[m] for m in ("baseline", "null_experts")})
    table_limit, own_limit = (outcomes(one)["null_experts"].detectable for one in (records, alone))
    assert table_limit is not None
    assert own_limit is not None
    # Among three methods the first verdict needs 1.7 %.
    assert table_limit > own_limit
    monkeypatch.setattr(verdicts, "holm", lambda p_values: dict.fromkeys(p_values, 1.0))
    found = outcomes(records)
    assert {found[method].kind for method in ("top_p", "null_experts", "random_k")} == {"smaller"}
    # Controls are no part of it.
    assert {found[method].kind for method in ("twin", "other_order")} == {"control"}


def test_text_holds_every_column_the_noise_and_xz(comparison_folder):
    text = table_text(read_records(comparison_folder))
    headings = [
        "method",
        "bits/byte",
        "difference",
        "would see",
        "at the fork",
        "verdict",
        "experts",
        "total",
        "active",
    ]
    assert [column.heading for column in SHOWN] == [*headings, "FLOPs/token", "KV/token 4K", "KV/token 64K"]
    for column in SHOWN:
        assert column.heading is not None
        assert column.heading in text
    assert "xz -9, same text" in text
    assert "1.7000" in text
    assert "not trunk noise" in text
    assert "400 sections of 40 documents" in text
    assert "What the answer is about: block 7, last 20 % of the tokens." in text
    # 3 more seeds of 6 arms at 5 s each.
    assert re.search(r"3 more seeds, about 90 s, would see a difference of 0\.00\d\d in every method", text)
    assert "in block 7, the part above the frozen boundary" in text
    assert "its data order differs too" in text
    assert "cost ledger" in text


def test_the_trunk_stands_below_its_branches_and_few_seeds_are_explained(comparison_folder):
    records = read_records(comparison_folder)
    text = table_text(records)
    assert re.search(r"^trunk at its end +2\.00\d\d$", text, re.MULTILINE)
    assert (
        "4.3 standard errors of the mean over 3 seeds (Student's t with 2 degrees of freedom; 12.7 with two seeds"
        in text
    )
    assert "WARNING" not in text
    # Nobody re-measures what other days and other machines have timed.
    assert "tokens/s" not in text


def test_branches_that_end_worse_than_their_trunk_are_warned_of(write_synthetic):
    folder = write_synthetic()
    path = folder / "../../trunks/0/sections.csv"
    losses = [dataclasses.replace(row, nats=0.94 * row.nats) for row in read_rows(path, SectionLoss)]
    write_rows(path, SectionLoss, losses)
    (warning,) = (note for note in footnotes(read_records(folder)) if note.startswith("WARNING"))
    assert "worse than the trunk that they start from (1.88" in warning
    assert "random_k by 0.0" in warning
    assert "--trunk-share" in warning


def test_unequal_budgets_are_named(write_synthetic):
    folder = write_synthetic()
    assert unequal_budgets(read_records(folder)) is None
    for seed in range(3):
        path = folder / f"../../branches/top_p_0_{seed}/result.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"forward_flops": 0.62 * result["forward_flops"]}))
        path = folder / f"../../branches/random_k_0_{seed}/metrics.jsonl"
        lines = path.read_text().splitlines()
        more = [json.dumps(json.loads(line) | {"step": len(lines) + n}) for n, line in enumerate(lines, 1)]
        path.write_text("\n".join([*lines, *more]) + "\n")
    assert unequal_budgets(read_records(folder)) == (
        "Not at the baseline's cost: top_p (0.62 times the FLOPs per token); random_k (2 times the tokens)."
    )


def test_domains_have_bits_per_byte_of_their_own(comparison_folder):
    records = read_records(comparison_folder)
    assert domain_table(records) == []
    # Forty documents of ten sections each, of two domains that take turns.
    split = dataclasses.replace(records.comparison, domains=("code", "wiki") * 20)
    records = dataclasses.replace(records, comparison=split)
    head, sizes, first, *_ = domain_table(records)
    assert (head, sizes) == (["method", "code", "wiki"], ["bytes", "256,000", "256,000"])
    run = records.branches["baseline"][0, 0]
    parts = bits_by_domain(run, split.domains)
    # Of equal size, so the whole text's is their mean.
    assert sum(parts.values()) / 2 == pytest.approx(run.bits_per_byte)
    assert float(first[1]) == pytest.approx(
        statistics.fmean(bits_by_domain(each, split.domains)["code"] for each in records.branches["baseline"].values()),
        abs=6e-5,
    )
    assert "bits/byte by domain of the validation text\nmethod" in table_text(records)
    assert "<h2>By domain</h2>" in report.domains(records)
    # As many as documents: file names, and no domains.
    alone = dataclasses.replace(split, domains=tuple(map(str, range(40))))
    assert domain_table(dataclasses.replace(records, comparison=alone)) == []


def test_csv_holds_the_rows_in_full_precision(comparison_folder, tmp_path):
    records = read_records(comparison_folder)
    write_csv(records, tmp_path / "table.csv")
    assert b"\r" not in (tmp_path / "table.csv").read_bytes()
    *read, trunk = csv.DictReader((tmp_path / "table.csv").open())
    assert (trunk["method"], trunk["runs"], trunk["difference"]) == ("trunk", "1", "")
    assert float(trunk["bits_per_byte"]) == records.trunks[0].bits_per_byte
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
    assert shown.count('<td data-label="all weights">9 M</td>') == 6
    assert "budget_tokens" not in shown


def test_several_trunks_say_which_noise_they_hold(write_synthetic):
    records = read_records(write_synthetic(trunk_seeds=(0, 1, 2), branch_seeds=(0, 1)))
    rows = table_rows(records)
    assert rows[0].runs == 6
    assert rows[0].bits_per_byte.n == 3
    assert "trunk noise (initial weights, trunk data order) and branch noise, over 3 trunks" in " ".join(
        footnotes(records)
    )
    assert {row.verdict.split()[0] for row in rows[3:]} == {"better", "smaller", "worse"}
    assert not any("on this trunk" in row.verdict for row in rows)
    assert any("3 more trunks, about" in note for note in footnotes(records))


def test_one_seed_speaks_of_itself_with_the_noise_of_text_and_rounding(write_synthetic):
    records = read_records(write_synthetic(branch_seeds=(0,)))
    rows = {row.method: row for row in table_rows(records)}
    assert rows["other_order"].verdict == "not judged: one order has no spread"
    judged = (rows[method] for method in ("twin", "top_p", "null_experts", "random_k"))
    assert all(row.verdict.endswith(" on this seed of this trunk") for row in judged)
    difference, twin = rows["top_p"].outcome.difference, rows["twin"].outcome.difference
    assert difference is not None
    assert twin is not None
    assert difference.runs == Noise(variance=pytest.approx(twin.mean**2), freedom=1)
    assert "speak of this seed on this trunk only" in " ".join(footnotes(records))
    assert all(row.bits_per_byte.half_width is None for row in rows.values())
    assert would_see(records) is None


def test_one_seed_without_a_twin_earns_no_verdict(write_synthetic):
    rows = table_rows(read_records(write_synthetic(branch_seeds=(0,), methods=("baseline", "top_p"))))
    assert rows[1].verdict == "no verdict: one seed, and no twin to measure rounding"


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
