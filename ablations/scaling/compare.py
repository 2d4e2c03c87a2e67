"""`python -m ablations scaling compare`: whether a method is still better at a larger size.

Both laws are L = E + A x^-a with one exponent: then their difference is dE + dA x^-a, which four sizes can tell, where
the difference of two free laws could be anything. The exponent comes from both ladders together.

The bootstrap is parametric: draws of the pairs' differences around the fitted line and of all losses around their laws,
with standard deviations that are themselves drawn (scaled inverse chi-squared), so that few sizes give wide intervals.

Legend: P pairs (one scale and seed each), R draws, G exponents of a grid.
"""

import dataclasses
import math

import numpy as np

from ablations.scaling.figure import draw_differences
from ablations.scaling.options import CompareOptions
from ablations.scaling.points import read_table
from foundation.command import refuse_unwritable
from foundation.tables import write_rows, write_table

LEAST_SIZES = 4
EXPONENTS = np.geomspace(0.02, 1.5, 120)
TABLE_FILE, CURVE_FILE, PAIRS_FILE, FIGURE_FILE = "compare.csv", "curve.csv", "pairs.csv", "compare.png"
LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The method and the baseline at the same scales and seeds.

    Attributes:
        scale_P: ascending, in units of the largest.
        largest: of the scales.
    """

    scale_P: np.ndarray
    method_P: np.ndarray
    baseline_P: np.ndarray
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferenceRow:
    """What the laws say at one scale.

    Attributes:
        times: multiple of the ladder's largest scale.
        difference: method - baseline; negative is better.
        low, high: 95 %.
        better: share of the draws in which the method is better.
    """

    method: str
    times: float
    scale: float
    difference: float
    low: float
    high: float
    better: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Differences:
    """A fit with its draws.

    Attributes:
        exponent, constant, slope: a, dE and dA, x in units of the largest scale; `_R` are draws of the same.
    """

    exponent: float
    constant: float
    slope: float
    exponent_R: np.ndarray
    constant_R: np.ndarray
    slope_R: np.ndarray

    def at(self, times: float) -> tuple[float, np.ndarray]:
        """The difference at a multiple of the largest scale, and its draws [R]."""
        drawn_R = self.constant_R + self.slope_R * times**-self.exponent_R
        return self.constant + self.slope * times**-self.exponent, drawn_R


def compare_command(options: CompareOptions) -> list[DifferenceRow]:
    """Fits, prints and writes.

    Raises:
        ValueError: see `read_pairs`.
    """
    refuse_unwritable("--out", options.out, folder=True)
    pairs = read_pairs(options)
    found = fit_differences(pairs, draws=options.draws)
    rows = [difference_row(options.method, found, pairs, times) for times in options.at]
    print(
        "\n".join(
            [
                f"{options.method} - {options.baseline}, from {len(pairs.scale_P)} pairs at"
                f" {len(np.unique(pairs.scale_P))} sizes; negative is better",
                *map(row_line, rows),
                crossover_line(found, pairs, max(options.at)),
            ]
        )
    )
    if options.out is not None:
        write_rows(options.out / TABLE_FILE, DifferenceRow, rows)
        times = np.geomspace(float(pairs.scale_P.min()), max(options.at), 80)
        curve = [difference_row(options.method, found, pairs, float(each)) for each in times]
        write_rows(options.out / CURVE_FILE, DifferenceRow, curve)
        cells = zip(pairs.scale_P * pairs.largest, pairs.method_P, pairs.baseline_P)
        write_table(
            options.out / PAIRS_FILE, ("scale", "method", "baseline"), ([f"{x:.6g}" for x in row] for row in cells)
        )
        draw_differences(
            (pairs.scale_P * pairs.largest, pairs.method_P - pairs.baseline_P),
            curve,
            options.scale_column,
            options.out / FIGURE_FILE,
        )
        print(f"\ncompare: {options.out}")
    return rows


def read_pairs(options: CompareOptions) -> Pairs:
    """The rows of both, paired.

    Raises:
        ValueError: for a method that the table has not, two rows of one method at one scale and seed, or fewer than
            four sizes with a pair.
    """
    table = read_table(options.points)
    methods = table.column(options.method_column)
    scale, loss = table.numbers(options.scale_column), table.numbers(options.loss_column)
    seeds = table.column(options.seed_column) if options.seed_column else [""] * len(methods)
    found: dict[str, dict[tuple[float, str], float]] = {options.method: {}, options.baseline: {}}
    for name in found:
        if name not in methods:
            raise ValueError(f"{options.points}: no row of {name!r}; it has {', '.join(sorted(set(methods)))}")
    for name, x, seed, value, line in zip(methods, scale, seeds, loss, table.lines):
        if name in found:
            key = (float(x), seed)
            if key in found[name]:
                raise ValueError(
                    f"{options.points}, line {line}: a second row of {name!r} at {options.scale_column} {x:g}"
                    f"{f', seed {seed}' if seed else '; name the column of seeds, if these are seeds'}"
                )
            found[name][key] = float(value)
    both = sorted(found[options.method].keys() & found[options.baseline].keys())
    sizes = len({x for x, _ in both})
    if sizes < LEAST_SIZES:
        raise ValueError(
            f"{options.points}: {options.method} and {options.baseline} meet at {sizes} sizes; a difference of laws"
            f" needs at least {LEAST_SIZES}"
        )
    largest = both[-1][0]
    return Pairs(
        scale_P=np.array([x / largest for x, _ in both]),
        method_P=np.array([found[options.method][key] for key in both]),
        baseline_P=np.array([found[options.baseline][key] for key in both]),
        largest=largest,
    )


def fit_differences(pairs: Pairs, *, draws: int, seed: int = 0) -> Differences:
    """The difference of laws and its draws."""
    generator = np.random.default_rng(seed)
    losses_2P = np.stack([pairs.method_P, pairs.baseline_P])
    residual_G2P, squares_G = _laws(pairs.scale_P, losses_2P)
    best = int(squares_G.argmin())
    n = len(pairs.scale_P)
    # Four linear parameters and the exponent.
    spread_R = _spread(float(squares_G[best]), max(2 * n - 5, 1), draws, generator)
    noise_R2P = spread_R[:, None, None] * generator.standard_normal((draws, 2, n))
    fitted_2P = losses_2P - residual_G2P[best]
    exponent_R = EXPONENTS[np.array([_laws(pairs.scale_P, fitted_2P + each)[1].argmin() for each in noise_R2P])]

    difference_P = pairs.method_P - pairs.baseline_P
    line_P2 = np.stack([np.ones(n), pairs.scale_P ** -EXPONENTS[best]], axis=1)
    (constant, slope), *_ = np.linalg.lstsq(line_P2, difference_P)
    centre_P = line_P2 @ np.array([constant, slope])
    squares = float(((difference_P - centre_P) ** 2).sum())
    drawn_RP = centre_P + _spread(squares, n - 2, draws, generator)[:, None] * generator.standard_normal((draws, n))
    lines_RP2 = np.stack([np.ones((draws, n)), pairs.scale_P ** -exponent_R[:, None]], axis=2)
    drawn_R2 = np.einsum("rtp,rp->rt", np.linalg.pinv(lines_RP2), drawn_RP)
    return Differences(
        exponent=float(EXPONENTS[best]),
        constant=float(constant),
        slope=float(slope),
        exponent_R=exponent_R,
        constant_R=drawn_R2[:, 0],
        slope_R=drawn_R2[:, 1],
    )


def _laws(scale_P: np.ndarray, losses_2P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of both laws for every exponent, [G, 2, P], and their sums of squares, [G]."""
    power_GP = scale_P ** -EXPONENTS[:, None]
    power_GP = power_GP - power_GP.mean(1, keepdims=True)
    centred_2P = losses_2P - losses_2P.mean(1, keepdims=True)
    slope_G2 = np.einsum("gp,mp->gm", power_GP, centred_2P) / (power_GP**2).sum(1, keepdims=True)
    residual_G2P = centred_2P - np.maximum(slope_G2, 0.0)[:, :, None] * power_GP[:, None, :]
    return residual_G2P, (residual_G2P**2).sum((1, 2))


def _spread(squares: float, freedom: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Draws of a standard deviation that `squares` with so many degrees of freedom leave open, [R]."""
    return np.sqrt(squares / generator.chisquare(freedom, draws))


def difference_row(method: str, found: Differences, pairs: Pairs, times: float) -> DifferenceRow:
    """The difference at one scale."""
    value, drawn_R = found.at(times)
    low, high = np.quantile(drawn_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return DifferenceRow(
        method=method,
        times=times,
        scale=times * pairs.largest,
        difference=value,
        low=float(low),
        high=float(high),
        better=float((drawn_R < 0).mean()),
    )


def row_line(row: DifferenceRow) -> str:
    """A row in words."""
    verdict = "not told apart"
    if row.high < 0:
        verdict = "still better"
    elif row.low > 0:
        verdict = "worse"
    return (
        f"at {row.times:g}x the largest size ({row.scale:.3g}): {row.difference:+.4f}"
        f" ({row.low:+.4f} to {row.high:+.4f}), {verdict}; better in {row.better:.0%} of the draws"
    )


def crossover_line(found: Differences, pairs: Pairs, reach: float) -> str:
    """Where the laws cross, between the smallest size and the farthest that was asked for."""
    smallest = float(pairs.scale_P.min())
    crossing_R = np.array([_crossing(*each) for each in zip(found.exponent_R, found.constant_R, found.slope_R)])
    share = float(((crossing_R > smallest) & (crossing_R < reach)).mean())
    where = _crossing(found.exponent, found.constant, found.slope)
    if smallest < where < reach:
        text = f"the laws cross at {where * pairs.largest:.3g}, {where:.3g} times the largest size"
    else:
        text = f"the laws do not cross up to {reach:g}x"
    return f"{text}; {share:.0%} of the draws cross there"


def _crossing(exponent: float, constant: float, slope: float) -> float:
    """x at which constant + slope x^-exponent is 0; NaN where it never is."""
    if constant * slope >= 0:
        return math.nan
    # A crossing beyond all numbers is none.
    return float(np.exp(min(np.log(-slope / constant) / exponent, 700.0)))
