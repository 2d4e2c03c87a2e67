"""Bits per byte by domain, where the validation text has some: a gain in one may be a loss in another."""

import math
import statistics
from collections.abc import Mapping

from ablations.comparison.records import RecordedRun, Records

# With more names the files are documents and no domains.
MOST = 12
DOMAINS_FILE = "domains.csv"


def domain_table(records: Records) -> list[list[str]]:
    """A heading and one row per method: bits per byte in each domain, mean over its runs, with the domains' bytes under
    the heading; empty where the text has no domains, or as many as it has documents."""
    comparison = records.comparison
    names = sorted(set(comparison.domains))
    if not 2 <= len(names) <= MOST or len(names) == len(comparison.domains):
        return []
    first = next(iter(records.branches[comparison.baseline].values()))
    sizes = {name: sum(s.n_bytes for s in first.sections if comparison.domains[s.document] == name) for name in names}
    rows = [["method", *names], ["bytes", *(f"{sizes[name]:,}" for name in names)]]
    for method in records.methods:
        by_run = [bits_by_domain(run, comparison.domains) for run in records.branches[method].values()]
        rows.append([method, *(f"{statistics.fmean(bits[name] for bits in by_run):.4f}" for name in names)])
    return rows


def bits_by_domain(run: RecordedRun, domains: tuple[str, ...]) -> Mapping[str, float]:
    """Bits per byte of one run, by domain."""
    nats: dict[str, float] = {}
    n_bytes: dict[str, int] = {}
    for section in run.sections:
        name = domains[section.document]
        nats[name] = nats.get(name, 0.0) + section.nats
        n_bytes[name] = n_bytes.get(name, 0) + section.n_bytes
    return {name: total / (n_bytes[name] * math.log(2)) for name, total in nats.items()}


def domain_text(records: Records) -> str:
    """The table for the terminal, with a line above it; empty without domains."""
    rows = domain_table(records)
    if not rows:
        return ""
    first, *others = (max(len(cell) for cell in column) for column in zip(*rows))
    lines = [
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others))])
        for name, *cells in rows
    ]
    return "\n".join(["bits/byte by domain of the validation text", *lines])
