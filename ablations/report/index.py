"""`python -m ablations runs`: what lies in a folder of runs, as a list and as `index.html`, newest first, with links to
reports and folders."""

import html
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import tyro

from ablations.report.run_folders import RunFolder, mebibytes, run_folders
from foundation.files import write_text

INDEX_FILE, REPORT = "index.html", "report.html"
# In the order of the page.
HEADINGS = {
    "comparison": "Comparisons",
    "trunk": "Trunks",
    "branch": "Branches",
    "run": "Other runs",
    "corpus": "Prepared texts",
}


def runs_command(root: tyro.conf.Positional[Path] = Path("runs")) -> None:
    """List trunks, branches, comparisons and prepared texts: what, when, bits per byte, how large, what came out.
    Written as a page with links, too: `index.html` in the folder.

    Args:
        root: folder that is searched, with all folders below it.
    """
    found = in_order(run_folders(root))
    if not found:
        print(f"no runs in {root}")
        return
    width = max(len(str(run.folder)) for run in found)
    for run in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        sizes = f"{bits_text(run):>6} bits per byte  {mebibytes(run.n_bytes)}"
        print(f"{run.folder!s:<{width}}  {run.what:<10}  {when}  {sizes}  {run.verdict}")
    print(f"{len(found)} folders, {mebibytes(sum(run.n_bytes for run in found)).strip()}")
    print(f"index: {write_index(root, found)}")


def write_index(root: Path, found: Sequence[RunFolder]) -> Path:
    """Writes the page of the folders found below `root`.

    Returns:
        Its path.
    """
    # Half a second to import, for the colours of the figures.
    from ablations.report.report import CSS_FILE, theme

    total = mebibytes(sum(folder.n_bytes for folder in found)).strip()
    sections = []
    for what, own in itertools.groupby(in_order(found), key=lambda folder: folder.what):
        lines = "".join(_line(root, folder) for folder in own)
        sections.append(
            f"<h2>{HEADINGS[what]}</h2><div class=scroll><table class=index><thead><tr><th>folder</th>"
            "<th>last written</th><th>bits/byte</th><th>size</th><th class=verdict>what came out</th></tr></thead>"
            f"<tbody>{lines}</tbody></table></div>"
        )
    path = root / INDEX_FILE
    write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width, initial-scale=1"><title>Runs</title>'
        f"<style>{theme()}{CSS_FILE.read_text(encoding='utf-8')}</style></head>\n<body><main>"
        f"<h1>Runs in {html.escape(str(root))}</h1><p>{len(found)} folders, {total}. Made by <code>.venv/bin/python -m"
        f" ablations runs</code>.</p>\n{''.join(sections)}\n</main></body></html>\n",
    )
    return path


def in_order(found: Sequence[RunFolder]) -> list[RunFolder]:
    """By kind, newest first."""
    return sorted(found, key=lambda folder: (list(HEADINGS).index(folder.what), -folder.changed))


def bits_text(found: RunFolder) -> str:
    """Four decimals, or a dash."""
    return "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"


def _line(root: Path, found: RunFolder) -> str:
    report = found.folder / REPORT
    place = os.path.relpath(report if report.is_file() else found.folder, root)
    name = os.path.relpath(found.folder, root)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.changed))
    return (
        f'<tr><td><a href="{quote(place)}">{html.escape(name)}</a></td><td>{when}</td>'
        f"<td>{bits_text(found)}</td><td>{mebibytes(found.n_bytes).strip()}</td>"
        f"<td class=verdict>{html.escape(found.verdict)}</td></tr>"
    )
