"""How the form of the ratio law was chosen: its variants on a ladder, the largest size from the others.

    python tests/ablations/scaling/forms.py LADDER.csv.gz FILE.csv COLUMN_OF_LOSS ...

The ladder has the columns of the public one (`n_params`, `total_tokens`).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from ablations.scaling import every_step, ratio_law
from ablations.scaling.every_step import predict_run
from ablations.scaling.ladder_runs import read_ladder
from ablations.scaling.options import PredictOptions
from foundation.tables import write_table

FULL, OMEGA = ratio_law.loss_of, ratio_law.OMEGA


def tokens_alone(values, seen):
    """B / D^c instead of B N^-b (D / N)^-c: the size has no part in the second term."""
    constant, log_a, a, log_b, _, c, f, log_c = values
    return FULL((constant, log_a, a, log_b, c, c, f, log_c), seen)


def one_exponent(values, seen):
    """Both terms fall alike with the size."""
    constant, log_a, a, log_b, _, c, f, log_c = values
    return FULL((constant, log_a, a, log_b, a, c, f, log_c), seen)


def no_schedule(values, seen):
    """The rate's falls gain nothing."""
    return FULL((*values[:6], 0.0, values[7]), seen)


VARIANTS = {
    "ratio law": (FULL, OMEGA),
    "batch of no effect": (FULL, 0.0),
    "OMEGA 0.1": (FULL, 0.1),
    "OMEGA 0.3": (FULL, 0.3),
    "OMEGA 0.45": (FULL, 0.45),
    "one exponent of the size": (one_exponent, OMEGA),
    "tokens alone": (tokens_alone, OMEGA),
    "no schedule": (no_schedule, OMEGA),
}


def row(name, variant, omega, runs):
    """E, its lowest and highest with one size left out; then mean absolute errors in %, past 2.5 tokens per parameter:
    the law alone over all runs, and the largest size from the others, without and with what the others leave over."""
    every_step.loss_of = ratio_law.loss_of = variant
    ratio_law.OMEGA = omega
    values_V = ratio_law.fit_ladder(runs)

    def errors(values_V, own, predict):
        found = []
        for run in own:
            settled_P = run.tokens_P >= 2.5 * run.setting.params
            tokens_P, loss_P = run.tokens_P[settled_P], run.loss_P[settled_P]
            found.append(100 * np.abs(np.log(predict(values_V, run.setting, tokens_P) / loss_P)))
        return float(np.concatenate(found).mean())

    def law(values_V, setting, tokens_P):
        return variant(list(values_V), ratio_law.see(setting, tokens_P))

    largest = max(run.setting.params for run in runs)
    rest = [run for run in runs if run.setting.params < largest]
    last = [run for run in runs if run.setting.params == largest]
    rest_V = ratio_law.fit_ladder(rest)
    constants = [
        ratio_law.fit_ladder([run for run in runs if run.setting.params != size])[0]
        for size in sorted({run.setting.params for run in runs})
    ]
    return [
        name,
        *(
            f"{number:.3f}"
            for number in (
                values_V[0],
                min(constants),
                max(constants),
                errors(values_V, runs, law),
                errors(rest_V, last, law),
                errors(rest_V, last, lambda values_V, *place: predict_run(values_V, rest, *place)),
            )
        ),
    ]


if __name__ == "__main__":
    ladder, path, *columns = sys.argv[1:]
    rows = []
    for column in columns:
        options = PredictOptions(ladder=Path(ladder), params_column="n_params", tokens_column="total_tokens")
        runs = read_ladder(options, column)
        for name, (variant, omega) in VARIANTS.items():
            rows.append([column, *row(name, variant, omega, runs)])
            print(*rows[-1], sep="  ", flush=True)
    write_table(
        Path(path), ("set", "variant", "E", "E_low", "E_high", "all_runs", "largest_law", "largest_predicted"), rows
    )
