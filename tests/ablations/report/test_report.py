"""The report: one file, every figure, no reference outside itself, csv files beside and inside it."""

import base64
import csv
import re
from html.parser import HTMLParser

import pytest

from ablations.comparison.records import read_records
from ablations.report.figures import all_figures
from ablations.report.report import REPORT_FILE, TABLE_FILE, headline, show, write_report
from ablations.report.table import table_rows

LOADING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}


class References(HTMLParser):
    """Collects what a browser would load or link to, ids, and the text."""

    def __init__(self):
        super().__init__()
        self.references, self.ids, self.text, self.tags = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in LOADING:
                self.references.append(value)
            if name == "id":
                self.ids.add(value)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def report(comparison_folder):
    path = write_report(read_records(comparison_folder))
    parser = References()
    parser.feed(path.read_text())
    return path, parser


def test_contains_every_figure_table_plan_ledger_and_environment(report, comparison_folder):
    _, parser = report
    names = [figure.name for figure in all_figures(read_records(comparison_folder))]
    assert names == [
        "differences",
        "loss_curves",
        "validation_curves",
        "branch_differences",
        "loss_against_experts",
        "experts_per_token",
        "routers",
        "costs",
    ]
    assert set(names) <= parser.ids
    assert parser.tags.count("svg") == len(names)
    text = " ".join(parser.text)
    for expected in (
        "null_experts",
        "xz -9",
        "staged, total",
        "from scratch",
        "trunk, then branches <&>",
        '"commit": "abc"',
        "not trunk noise",
    ):
        assert expected in text


def test_refers_to_nothing_outside_itself(report):
    path, parser = report
    assert parser.references
    for reference in parser.references:
        assert reference.startswith(("data:text/csv;base64,", "#")), reference
    content = path.read_text()
    assert "http" not in content
    assert "@import" not in content
    assert {"script", "link", "iframe", "img"}.isdisjoint(parser.tags)
    # Paint and clip references point at ids that are there.
    assert all(target in parser.ids for target in re.findall(r"url\(#([^)]*)\)", content))
    assert all(reference[1:] in parser.ids for reference in parser.references if reference.startswith("#"))


def test_csv_links_hold_the_files_beside_the_report(report, comparison_folder):
    path, parser = report
    embedded = {
        base64.b64decode(reference.split(",", 1)[1]) for reference in parser.references if reference.startswith("data:")
    }
    files = [path.parent / "table.csv", *sorted((path.parent / "figures").glob("*.csv"))]
    assert {file.read_bytes() for file in files} == embedded
    for figure in all_figures(read_records(comparison_folder)):
        with (path.parent / "figures" / f"{figure.name}.csv").open() as file:
            header, *rows = csv.reader(file)
        assert tuple(header) == figure.columns
        assert rows == [["" if cell is None else str(cell) for cell in row] for row in figure.rows]


def test_is_the_same_whenever_it_is_made_again(report, comparison_folder):
    before = report[0].read_text()
    assert write_report(read_records(comparison_folder)).read_text() == before


def test_follows_light_and_dark_and_narrow_screens(report):
    content = report[0].read_text()
    assert "prefers-color-scheme:dark" in content
    assert 'name="viewport"' in content
    assert "max-width: 560px" in content


def test_everything_is_written_before_anything_is_printed(comparison_folder, monkeypatch):
    for name in (REPORT_FILE, TABLE_FILE):
        (comparison_folder / name).unlink(missing_ok=True)

    def broken(*values, **options):
        raise UnicodeEncodeError("ascii", "\xb1", 0, 1, "ordinal not in range")

    monkeypatch.setattr("builtins.print", broken)
    with pytest.raises(UnicodeEncodeError):
        show(comparison_folder)
    assert (comparison_folder / REPORT_FILE).is_file()
    assert (comparison_folder / TABLE_FILE).is_file()


def test_headline_claims_no_more_than_the_verdicts(comparison_folder, write_synthetic):
    records = read_records(comparison_folder)
    rows = table_rows(records)
    title = headline(records, rows)
    assert title.startswith(
        "Against baseline (block 7, last 20 % of the tokens), top_p is better; random_k is worse; null_experts is not"
        " told apart; this run could have seen a difference of 0.00"
    )
    single = read_records(write_synthetic(branch_seeds=(0,), methods=("baseline", "top_p")))
    assert "nothing can be said yet" in headline(single, table_rows(single))


def test_a_lone_baseline_still_makes_a_report(write_synthetic):
    path = write_report(read_records(write_synthetic(methods=("baseline",))))
    assert 'id="loss_curves"' in path.read_text()
    assert 'id="differences"' not in path.read_text()
