"""The report and the index of runs as a browser draws them, on a phone and on a screen, light and dark: nothing leaves
the page, overlaps, is clipped or lies on a curve."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest

from ablations.comparison.records import read_records
from ablations.report.domains import MOST
from ablations.report.index import write_index
from ablations.report.report import write_report
from ablations.report.run_folders import run_folders

PHONE, SCREEN = 400, 1280


def tools():
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(comparison_folder, tmp_path_factory):
    """A report whose cells are as wide as they come: a withheld verdict, a control of known sign, domains."""
    root = shutil.copytree(comparison_folder.parents[1], tmp_path_factory.mktemp("pages") / "runs")
    folder = root / comparison_folder.relative_to(comparison_folder.parents[1])
    for seed in range(3):
        path = folder / f"../../branches/random_k_0_{seed}/metrics.jsonl"
        first, *others = path.read_text().splitlines()
        record = json.loads(first)
        record["loss"] += 0.1 * 3.6 * math.log(2)
        path.write_text("\n".join([json.dumps(record), *others]) + "\n")
    path = folder / "comparison.json"
    comparison = json.loads(path.read_text())
    next(method for method in comparison["methods"] if method["name"] == "top_p")["known"] = "better"
    # As many domains as are shown, their names as long as names of files are.
    names = [f"domain_of_some_files_{number}" for number in range(MOST)]
    command = f".venv/bin/python -m ablations compare {' '.join(names)} --seeds 3"
    path.write_text(json.dumps(comparison | {"domains": (names * 4)[:40], "command": command}))
    return {"report": write_report(read_records(folder)), "index": write_index(root, run_folders(root))}


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_or_overlaps(pages, dark):
    found = tools()
    if found.browser() is None:
        pytest.skip(f"no browser to look with: one of {', '.join(found.BROWSERS)}")
    seen = found.look(pages, (PHONE, SCREEN), dark=dark)
    assert set(seen) == {f"{page} {width}" for page in pages for width in (PHONE, SCREEN)}
    problems = {where: one["problems"] for where, one in seen.items() if one["problems"]}
    assert not problems, json.dumps(problems, indent=1)
    for one in seen.values():
        paper, ink = (sum(map(int, one[name].removeprefix("rgb(").rstrip(")").split(","))) for name in ("paper", "ink"))
        assert (paper < ink) == dark
        assert abs(paper - ink) > 400


@pytest.mark.slow
def test_faults_are_seen(tmp_path):
    found = tools()
    if found.browser() is None:
        pytest.skip(f"no browser to look with: one of {', '.join(found.BROWSERS)}")
    words = "<text x='{}' y='20'>words that are long</text>"
    faulty = (
        "<!doctype html><body><div style='width:600px'>wide</div>"
        "<svg aria-label='figure' viewBox='0 0 200 40' width=200>"
        f"{words.format(0)}{words.format(20)}{words.format(150)}"
        "<path d='M 0 15 L 200 15' style='fill:none;stroke:black'/></svg></body>"
    )
    # What a report is made of, each with the fault that a rule of its style keeps away.
    table = "<table style='width:{}'><tr><td>{}</td><td style='{}'>next</td></tr></table>"
    narrow = "<p style='width:60px;overflow:hidden;white-space:nowrap'>a sentence that is cut off</p>"
    pages = {
        "figure": faulty,
        "scrolled": f"<body><div class=scroll style='overflow:auto'>{table.format('900px', 'wide', '')}</div></body>",
        "cut": f"<body>{narrow}<pre style='overflow:auto'>{'a command ' * 30}</pre></body>",
        "over": f"<body>{table.format('200px', 'first', 'position:relative;left:-30px')}</body>",
    }
    for name, page in pages.items():
        (tmp_path / f"{name}.html").write_text(page)
    seen = found.look({name: tmp_path / f"{name}.html" for name in pages}, (PHONE,))
    problems = {name: " ".join(seen[f"{name} 400"]["problems"]) for name in pages}
    for fault in ("the page is 6", "figure: clipped", "words that are long on words", "a line runs through"):
        assert fault in problems["figure"]
    assert "scrolls sideways" in problems["scrolled"]
    assert "clipped: a sentence" in problems["cut"]
    assert "clipped: a command" in problems["cut"]
    assert "cells overlap: first and next" in problems["over"]


# A rule of the style, what stands in its place, and the width at which that is seen.
RULES = {
    "wrapped": ("white-space: pre-wrap; overflow-wrap: anywhere; font", "overflow-x: auto; font", PHONE),
    "headed": (".result thead, .domains thead { display: none; }", "", PHONE),
    "narrow": ("max-width: 560px", "max-width: 1px", PHONE),
    "bounded": ("max-width: 1280px; margin: 0 auto;", "width: 1400px;", SCREEN),
}


@pytest.mark.slow
def test_the_report_without_a_rule_of_its_style_fails(pages, tmp_path):
    """What keeps overflow away is not there in vain, and its absence is seen."""
    found = tools()
    if found.browser() is None:
        pytest.skip(f"no browser to look with: one of {', '.join(found.BROWSERS)}")
    content = pages["report"].read_text()
    for name, (rule, instead, _) in RULES.items():
        assert rule in content
        (tmp_path / f"{name}.html").write_text(content.replace(rule, instead))
    seen = found.look({name: tmp_path / f"{name}.html" for name in RULES}, (PHONE, SCREEN))
    for name, (_, _, width) in RULES.items():
        assert seen[f"{name} {width}"]["problems"], name
