"""The study from its command to its files, and what its table means in sentences."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ablations.agreement.cost import cost_text
from ablations.agreement.figure import draw
from ablations.agreement.options import AgreementOptions
from ablations.agreement.results import FAMILIES, RunRow, run_rows, scores
from ablations.agreement.settings import SETTINGS, SMALLER_MODEL
from ablations.agreement.shares import run_study
from ablations.agreement.statistics import ceiling
from ablations.agreement.study import Study, prepare_study
from ablations.agreement.table import SettingRow, arms_of, percent, setting_rows, table_text
from foundation.command import leave_options
from foundation.files import write_text
from foundation.tables import write_rows

RUNS_FILE, SETTINGS_FILE, FIGURE_FILE, REPORT_FILE = "runs.csv", "settings.csv", "agreement.png", "report.txt"
GUESSING = 0.5


def agreement_study(options: AgreementOptions) -> Path | None:
    """Prints what the study costs, runs what of it is not finished, and shows what it says.

    Returns:
        The folder of tables, figure and text; None after a dry run.

    Raises:
        ValueError: for options, text or arms that do not fit, and where too little has finished to compare.
        foundation.stopping.Interrupted: after a stop signal, with everything saved; the same call continues.
    """
    study = prepare_study(options)
    print(cost_text(study), flush=True)
    if options.dry_run:
        return None
    leave_options(study.folder)
    run_study(study)
    return show(study)


def show(study: Study) -> Path:
    """Writes and prints tables, figure and text from the finished runs."""
    runs, folder = run_rows(study), study.folder
    options = study.options
    names = [setting.name for setting in options.cheap]
    rows = setting_rows(runs, names, seeds=options.n_seeds, resamples=options.resamples)
    if not rows:
        raise ValueError(
            f"fewer than two arms beside the baseline have all runs of a setting; see {folder / RUNS_FILE}"
        )
    write_rows(folder / RUNS_FILE, RunRow, runs)
    write_rows(folder / SETTINGS_FILE, SettingRow, rows)
    draw(rows, folder / FIGURE_FILE)
    text = "\n\n".join([table_text(rows), truth_text(study, runs, rows), "\n".join(findings(rows))])
    write_text(folder / REPORT_FILE, text + "\n")
    print(f"\n{text}\n\nstudy: {folder}")
    return folder


def truth_text(study: Study, runs: Sequence[RunRow], rows: Sequence[SettingRow]) -> str:
    """The full runs' own numbers, and how well one seed of them agrees with the others."""
    options = study.options
    found = scores(runs, rows[0].setting, "all", options.n_seeds)
    order = sorted(range(len(found.arms)), key=lambda index: found.truth_AS[index].mean())
    lines = [f"full runs, {options.staging.tokens:,} tokens, {options.n_seeds} seeds, best first:"]
    for index in order:
        bits_S = found.truth_AS[index]
        lines.append(
            f"  {found.arms[index]:<24} {bits_S.mean():.4f} bits per byte"
            f" ({bits_S.mean() - found.truth_AS[0].mean():+.4f}; {study.families[found.arms[index]]})"
        )
    lines.append(
        f"A full run of one seed orders {percent(ceiling(found.truth_AS))} of all pairs as the mean of the other seeds"
        " does: the noise of the truth itself."
    )
    return "\n".join(lines)


def findings(rows: Sequence[SettingRow]) -> list[str]:
    """What the table means, in sentences."""
    lines = []
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        judged = [row for row in own if row.separable]
        if not own:
            continue
        name = arms_of(family)
        if not judged:
            lines.append(
                f"{name}: full runs tell no pair apart, so nothing can be said of any setting; take more seeds."
            )
            continue
        top = best(judged)
        lines.append(f"{name}: most trustworthy is {said(top)}.")
        branched = [row for row in judged if row.setting != SMALLER_MODEL.name]
        if branched and top not in branched:
            lines.append(f"{name}: of the branched settings it is {said(best(branched))}.")
        guessing = [row.setting for row in judged if not row.separable_share_low > GUESSING]
        if guessing:
            lines.append(f"{name}: cannot be told from guessing: {', '.join(guessing)}.")
        lines += frozen_text(name, judged)
        lines += proxy_text(name, judged)
        if missing := sorted({arm for row in own for arm in row.missing.split()}):
            lines.append(f"{name}: left out for lack of a run: {', '.join(missing)}.")
    return lines


def best(rows: Sequence[SettingRow]) -> SettingRow:
    """Of the largest share of separable pairs, then the largest tau, then the fewest FLOPs."""
    return max(rows, key=lambda row: (row.separable_share, -2.0 if math.isnan(row.tau) else row.tau, -row.flops))


def said(row: SettingRow) -> str:
    """A setting with its reliability and its price."""
    return (
        f"{row.setting}, {row.reliability} at {percent(row.flops)} of their FLOPs and {percent(row.seconds)} of their"
        f" time (top-1 regret {row.regret:.4f} bits per byte)"
    )


def frozen_text(name: str, rows: Sequence[SettingRow]) -> list[str]:
    """What freezing a prefix does to the answer, where settings differ in nothing else."""
    lines, groups = [], {}
    for row in rows:
        setting = SETTINGS[row.setting]
        if setting != SMALLER_MODEL:
            groups.setdefault(dataclasses.replace(setting, freeze=0.0), []).append((setting.freeze, row))
    for alike, group in groups.items():
        whole = next((row for freeze, row in group if not freeze), None)
        frozen = sorted((pair for pair in group if pair[0]), key=lambda pair: pair[0])
        if whole is None or not frozen:
            continue
        lost = [(freeze, whole.separable_agreeing - row.separable_agreeing) for freeze, row in frozen]
        verdict = "freezing loses none of them"
        if worse := [f"{count} at {freeze:g}" for freeze, count in lost if count > 0]:
            verdict = f"freezing loses {' and '.join(worse)}"
        if misled := [f"{freeze:g}" for freeze, row in frozen if row.separable_share_high < whole.separable_share]:
            verdict += f", beyond its interval at {' and '.join(misled)}: a frozen prefix misleads there"
        numbers = [(0.0, whole), *frozen]
        shares = ", ".join(f"{freeze:g}: {row.separable_agreeing} of {row.separable}" for freeze, row in numbers)
        lines.append(
            f"{name}, {alike.name.replace('_freeze0', '')}: separable pairs by frozen share {shares}; {verdict}."
        )
    return lines


def proxy_text(name: str, rows: Sequence[SettingRow]) -> list[str]:
    """How the branched settings stand beside a smaller model."""
    proxy = next((row for row in rows if row.setting == SMALLER_MODEL.name), None)
    branched = [row for row in rows if row.setting != SMALLER_MODEL.name]
    if proxy is None or not branched:
        return []
    better = [row.setting for row in branched if row.separable_agreeing > proxy.separable_agreeing]
    return [
        f"{name}: a smaller model, whole, orders {proxy.reliability} at {percent(proxy.flops)} of their FLOPs;"
        f" {len(better)} of {len(branched)} branched settings order more{': ' * bool(better)}{', '.join(better)}."
    ]
