"""Equal-compute counterfactuals from trained models to a verdict: is the policy's choice of experts worth anything?

`counterfactual` writes allocations.csv, differences.csv, verdict.txt and figure.png.
"""

from collections.abc import Sequence
from pathlib import Path

from ablations.counterfactual.figure import draw
from ablations.counterfactual.measure import Measured, measure
from ablations.counterfactual.options import CounterfactualOptions
from ablations.counterfactual.tables import AllocationRow, DifferenceRow, allocation_rows, difference_rows, write
from ablations.counterfactual.text import Text, held_out_text, run_names
from ablations.counterfactual.verdict import verdict_text
from foundation.command import leave_options, refuse_unwritable
from foundation.files import write_text


def counterfactual(options: CounterfactualOptions) -> Path:
    """Measures every run under every allocation and prints the verdict.

    Returns:
        The folder of the results.

    Raises:
        ValueError: for runs, text or numbers of experts that do not fit.
    """
    refuse_unwritable("--out", options.out, folder=True)
    text = held_out_text(options.run, options.text)
    measured = [measure(name, run, text, options) for name, run in zip(run_names(options.run), options.run)]
    return report(measured, text, options)


def report(measured: Sequence[Measured], text: Text, options: CounterfactualOptions) -> Path:
    """Tables, figure and verdict of what was measured, into the folder that is returned."""
    rows = allocation_rows(measured, text, resamples=options.resamples, seed=options.seed)
    differences = difference_rows(measured, text, resamples=options.resamples, seed=options.seed)
    leave_options(options.out)
    write(options.out / "allocations.csv", AllocationRow, rows)
    write(options.out / "differences.csv", DifferenceRow, differences)
    draw(rows, options.out / "figure.png")
    said = verdict_text(rows, differences, text.source)
    write_text(options.out / "verdict.txt", said)
    print(f"\n{said}\nresults: {options.out}", flush=True)
    return options.out
