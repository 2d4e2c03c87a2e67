"""`python -m ablations recall`: from its command to its tables and its figure."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ablations.recall.options import RecallOptions
from ablations.recall.published import PUBLISHED, PublishedPoint
from ablations.recall.results import RunRow, SegmentRow, StateRow, by_rate_of, run_rows, segment_rows, state_rows
from ablations.recall.study import Task, folder_of, run_study, tasks_of
from foundation.command import leave_options
from foundation.files import write_text
from foundation.tables import write_rows

RUNS_FILE, SEGMENTS_FILE, STATES_FILE, PUBLISHED_FILE = "runs.csv", "segments.csv", "states.csv", "published.csv"
FIGURE_FILE, REPORT_FILE = "recall.png", "report.txt"


def recall_study(options: RecallOptions) -> Path | None:
    """Runs what is not finished, and shows what it says.

    Returns:
        The folder of tables and figure; None after a dry run.

    Raises:
        ValueError: for options that do not fit.
        foundation.stopping.Interrupted: after a stop signal; the same call continues.
    """
    tasks = tasks_of(options)
    finished = sum(task.finished for task in tasks)
    first = tasks[0].run
    print(
        f"{len(tasks)} runs, {finished} of them finished; at most {first.steps:,} steps of {first.batch_size} texts of"
        f" {min(s.length for s in first.train)} to {max(s.length for s in first.train)} tokens each",
        flush=True,
    )
    if options.dry_run:
        return None
    if not options.show:
        leave_options(folder_of(options, tasks))
        run_study(options, tasks)
    elif not finished:
        raise ValueError(f"--show: none of the {len(tasks)} runs is finished in {options.out}")
    return show(options, tasks)


def show(options: RecallOptions, tasks: Sequence[Task]) -> Path:
    """Writes and prints tables and figure of the finished runs."""
    # Half a second to import.
    from ablations.recall.figure import draw

    folder = folder_of(options, tasks)
    rows, segments = run_rows(options, tasks), segment_rows(tasks)
    states = state_rows(rows)
    write_rows(folder / RUNS_FILE, RunRow, rows)
    write_rows(folder / SEGMENTS_FILE, SegmentRow, segments)
    write_rows(folder / STATES_FILE, StateRow, states)
    write_rows(folder / PUBLISHED_FILE, PublishedPoint, PUBLISHED)
    draw(rows, states, PUBLISHED, folder / FIGURE_FILE)
    text = table_text(rows, states)
    write_text(folder / REPORT_FILE, text + "\n")
    print(f"\n{text}\n\nstudy: {folder}")
    return folder


def table_text(rows: Sequence[RunRow], states: Sequence[StateRow]) -> str:
    """The grid as printed: every plan and width by every rate, mean and span over the seeds."""
    rates = sorted({row.rate for row in rows})
    lines = [
        f"{'plan':<6} {'width':>5} {'state bytes':>11} {'elements':>9}  "
        + "".join(f"{'rate ' + format(rate, 'g'):>20}" for rate in rates)
        + f"{'best':>22}"
    ]
    for state in states:
        by_rate = by_rate_of([row for row in rows if (row.plan, row.width) == (state.plan, state.width)])
        cells = []
        for rate in rates:
            own = by_rate.get(rate, [])
            span = f"{statistics.fmean(own):.3f} ({min(own):.3f}-{max(own):.3f})" if own else ""
            cells.append(f"{span:>20}")
        best = f"{state.accuracy:.3f} at {state.rate:g}{'*' if state.edge else ''}"
        lines.append(
            f"{state.plan:<6} {state.width:>5} {state.state_bytes:>11,} {state.state_elements:>9,}  "
            + "".join(cells)
            + f"{best:>22}"
        )
    lines.append(
        "accuracy of questions about associations that training never shows: mean over seeds (lowest-highest);"
        " * the best rate is at the edge of the grid"
    )
    return "\n".join(lines)
