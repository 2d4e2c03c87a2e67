"""From mixtures and losses of small runs to the losses of any mixture: the regression of RegMix (arXiv 2407.01492).

`python -m corpus mixture fit` learns from pairs of tables, one row a run: its share of every training domain, and its
loss on every validation domain. Two regressions per loss: linear in the shares with a small ridge, and a Gaussian
process on their square roots, whose length scales come from the training rows alone. Rank agreement with runs that
were not learnt from, of the same size or larger ones, says what the prediction is worth: a larger model's losses are
lower, their order is what carries over.

Legend: N runs, D training domains, V validation domains.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats
import tyro

from foundation.command import refuse_unwritable
from foundation.numbers import check_numbers
from foundation.tables import write_rows

RIDGE = 1e-4
LINEAR, PROCESS = "linear", "gaussian process"
# Of the search for length scales; ranks hardly change behind the first few.
STEPS = 10


@dataclass(frozen=True)
class Runs:
    """Mixtures and losses, rows in the order of the runs' numbers.

    Attributes:
        mixture_ND: shares, rows that sum to one or nearly.
        loss_NV: nats per token, or whatever is to be low.
    """

    domains: tuple[str, ...]
    losses: tuple[str, ...]
    mixture_ND: np.ndarray
    loss_NV: np.ndarray

    def __len__(self) -> int:
        return len(self.mixture_ND)


def read_runs(mixtures: Path, losses: Path) -> Runs:
    """Reads two csv files whose first column is the number of the run.

    Raises:
        ValueError: naming file and line of what cannot be read, runs that are in one file only, and mixtures that are
            none.
    """
    domains, rows = _read(mixtures)
    names, values = _read(losses)
    if rows.keys() != values.keys():
        alone = sorted(rows.keys() ^ values.keys())
        raise ValueError(f"{mixtures} and {losses}: runs that are in one of them only: {', '.join(alone[:5])}")
    order = sorted(rows, key=lambda run: (len(run), run))
    mixture_ND = np.array([rows[run] for run in order])
    wrong = np.flatnonzero((mixture_ND < 0).any(axis=1) | (np.abs(mixture_ND.sum(axis=1) - 1) > 0.02))
    if len(wrong):
        raise ValueError(f"{mixtures}: run {order[wrong[0]]} is no mixture: its shares must be positive and sum to one")
    return Runs(domains, names, mixture_ND, np.array([values[run] for run in order]))


def _read(path: Path) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if len(lines) < 2:
        raise ValueError(f"{path}: no runs; a header and one line per run are needed")
    found: dict[str, list[float]] = {}
    for number, (run, *cells) in enumerate(lines[1:], start=2):
        try:
            values = [float(cell) for cell in cells]
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if len(values) != len(lines[0]) - 1 or not np.isfinite(values).all():
            raise ValueError(f"{path}:{number}: {len(values)} finite numbers are needed, one per column of the header")
        found[run] = values
    return tuple(lines[0][1:]), found


class LinearRegression:
    """loss = a + sum of b_d x share_d, least squares with a small ridge."""

    def __init__(self, runs: Runs):
        x_ND = np.hstack((np.ones((len(runs), 1)), runs.mixture_ND))
        penalty = RIDGE * len(runs) * np.eye(x_ND.shape[1])
        penalty[0, 0] = 0
        self._weights_DV = np.linalg.solve(x_ND.T @ x_ND + penalty, x_ND.T @ runs.loss_NV)

    def predict(self, mixture_ND: np.ndarray) -> np.ndarray:
        """[N, V]."""
        return np.hstack((np.ones((len(mixture_ND), 1)), mixture_ND)) @ self._weights_DV


class GaussianProcess:
    """For each loss a Gaussian process with a squared exponential over the square roots of the shares, and noise.

    Square roots, because a loss falls steeply with the first per cent of a domain and slowly with the fiftieth. One
    length scale per domain, all parameters at the maximum of the marginal likelihood (Rasmussen and Williams 2006,
    section 5.4.1).
    """

    def __init__(self, runs: Runs, steps: int = STEPS):
        self._steps = steps
        self._x_ND = np.sqrt(runs.mixture_ND)
        self._mean_V, self._scale_V = runs.loss_NV.mean(axis=0), runs.loss_NV.std(axis=0)
        y_NV = (runs.loss_NV - self._mean_V) / self._scale_V
        self._fits = [self._fit(y_N) for y_N in y_NV.T]

    def _fit(self, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log parameters (length scales, signal, noise) and the weights of the training runs."""
        n, d = self._x_ND.shape
        start = np.concatenate((np.zeros(d), [0.5, -2.0]))
        squares_DNN = (self._x_ND[:, None] - self._x_ND[None]).transpose(2, 0, 1) ** 2

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            scaled_DNN = squares_DNN * np.exp(-2 * theta[:d])[:, None, None]
            k_NN = np.exp(2 * theta[d] - 0.5 * scaled_DNN.sum(axis=0))
            noise = np.exp(2 * theta[d + 1]) + 1e-6
            factor = scipy.linalg.cho_factor(k_NN + noise * np.eye(n), lower=True)
            alpha_N = scipy.linalg.cho_solve(factor, y_N)
            inverse_NN = scipy.linalg.cho_solve(factor, np.eye(n))
            outer_NN = inverse_NN - np.outer(alpha_N, alpha_N)
            weighted_NN = outer_NN * k_NN
            gradient = np.empty(d + 2)
            gradient[:d] = 0.5 * np.einsum("nm,dnm->d", weighted_NN, scaled_DNN)
            gradient[d] = weighted_NN.sum()
            gradient[d + 1] = np.exp(2 * theta[d + 1]) * np.trace(outer_NN)
            value = 0.5 * y_N @ alpha_N + np.log(np.diag(factor[0])).sum()
            return float(value), gradient

        bounds = [(-3.0, 3.0)] * d + [(-2.0, 3.0), (-5.0, 0.0)]
        theta = scipy.optimize.minimize(
            loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": self._steps}
        ).x
        k_NN = self._kernel(theta, self._x_ND)
        noise = np.exp(2 * theta[d + 1]) + 1e-6
        return theta, np.linalg.solve(k_NN + noise * np.eye(n), y_N)

    def _kernel(self, theta: np.ndarray, x_MD: np.ndarray) -> np.ndarray:
        d = x_MD.shape[1]
        a_MD, b_ND = x_MD * np.exp(-theta[:d]), self._x_ND * np.exp(-theta[:d])
        distance_MN = (a_MD**2).sum(1)[:, None] + (b_ND**2).sum(1)[None] - 2 * a_MD @ b_ND.T
        return np.exp(2 * theta[d] - 0.5 * np.maximum(distance_MN, 0))

    def predict(self, mixture_ND: np.ndarray) -> np.ndarray:
        """[N, V]."""
        x_MD = np.sqrt(mixture_ND)
        found = np.stack([self._kernel(theta, x_MD) @ weights for theta, weights in self._fits], axis=1)
        return found * self._scale_V + self._mean_V


@dataclass(frozen=True)
class AgreementRow:
    """How predicted and measured losses of runs agree that were not learnt from.

    Attributes:
        target: the measured losses' file.
        spearman: rank correlation over the runs.
        error: root mean square difference; of a larger model's losses it says nothing.
    """

    target: str
    loss: str
    regression: str
    runs: int
    spearman: float
    error: float


def agreement(
    regressions: dict[str, LinearRegression | GaussianProcess], runs: Runs, target: str
) -> list[AgreementRow]:
    """Rows for every loss, and "mean" for the mean of them all."""
    rows = []
    for name, regression in regressions.items():
        predicted_NV = regression.predict(runs.mixture_ND)
        losses = [*zip(runs.losses, predicted_NV.T, runs.loss_NV.T)]
        losses.append(("mean", predicted_NV.mean(axis=1), runs.loss_NV.mean(axis=1)))
        for loss, predicted_N, measured_N in losses:
            rank = float(scipy.stats.spearmanr(predicted_N, measured_N)[0])  # pyright: ignore[reportArgumentType]
            error = float(np.sqrt(np.mean((predicted_N - measured_N) ** 2)))
            rows.append(AgreementRow(target, loss, name, len(runs), rank, error))
    return rows


def matched(runs: Runs, learnt: Runs, what: Path) -> Runs:
    """Test runs whose columns are those that were learnt.

    Raises:
        ValueError: naming a column that one of them lacks.
    """
    for one, other in ((runs.domains, learnt.domains), (runs.losses, learnt.losses)):
        if one != other:
            strange = sorted(set(one) ^ set(other))
            raise ValueError(
                f"{what}: not the columns that were learnt from: {', '.join(strange[:5]) or 'another order'}"
            )
    return runs


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Learn from small runs which mixture gives which loss, and see how well that orders runs it has not seen.

    Attributes:
        action: fit.
        mixtures: csv of the runs to learn from: number of the run, then the share of each domain.
        losses: csv of the same runs: number, then each validation loss.
        test_mixtures: csv files like `mixtures`, of runs to predict.
        test_losses: csv files like `losses`, of the same runs, one for each.
        csv: file for the table.
        steps: of the search for length scales.
    """

    action: Annotated[Literal["fit"], tyro.conf.Positional]
    mixtures: Path
    losses: Path
    test_mixtures: tuple[Path, ...]
    test_losses: tuple[Path, ...]
    csv: Path | None = None
    steps: int = STEPS

    def __post_init__(self) -> None:
        check_numbers(self, steps=1)
        if len(self.test_mixtures) != len(self.test_losses):
            raise ValueError(
                f"--test-losses: {len(self.test_losses)} files, --test-mixtures: {len(self.test_mixtures)}; one for one"
            )


def fit(config: MixtureConfig) -> list[AgreementRow]:
    """Fits, and compares with every pair of test files.

    Raises:
        ValueError: for files that cannot be used.
    """
    refuse_unwritable("--csv", config.csv)
    learnt = read_runs(config.mixtures, config.losses)
    tests = [(read_runs(*pair), pair[1]) for pair in zip(config.test_mixtures, config.test_losses)]
    tests = [(matched(runs, learnt, file), file) for runs, file in tests]
    print(
        f"learning {len(learnt.losses)} losses from {len(learnt)} mixtures of {len(learnt.domains)} domains", flush=True
    )
    regressions = {LINEAR: LinearRegression(learnt), PROCESS: GaussianProcess(learnt, config.steps)}
    rows = [row for runs, file in tests for row in agreement(regressions, runs, file.stem)]
    if config.csv is not None:
        write_rows(config.csv, AgreementRow, rows)
    return rows


def table(rows: Sequence[AgreementRow]) -> str:
    """Spearman's rank correlation, one line per loss and target."""
    found = {(row.target, row.loss, row.regression): row for row in rows}
    lines = [f"{'target':<24} {'loss':<44} {'runs':>5} {LINEAR:>8} {PROCESS:>17}"]
    for target, loss in dict.fromkeys((row.target, row.loss) for row in rows):
        linear, process = (found[target, loss, name] for name in (LINEAR, PROCESS))
        lines.append(f"{target:<24} {loss:<44} {linear.runs:>5} {linear.spearman:>8.4f} {process.spearman:>17.4f}")
    return "\n".join(lines)
