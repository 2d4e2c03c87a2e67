"""From trained models to the answer: do harder tokens get more experts, and does that pay? Everything is computed on
held-out documents.

`analyse` writes correlations.csv, structure.csv, deciles.csv, regret.csv, frontier.csv, differences.csv, verdict.txt
and figure.png.

Legend: N tokens of real text, K forced numbers of experts, W windows, R resamples, D documents.
"""

import dataclasses
from pathlib import Path

import numpy as np

from ablations.difficulty import frontier
from ablations.difficulty.allocation import best_allocation, by_difficulty, loss_at
from ablations.difficulty.correlations import Bounded, document_sums, document_weights, matched_shuffle, ratio, spearman
from ablations.difficulty.figure import draw
from ablations.difficulty.frontier import OWN, UNIFORM, Point, measure_frontier, methods_of, own_policy
from ablations.difficulty.observe import Observed, observe_as
from ablations.difficulty.options import AnalysisOptions
from ablations.difficulty.results import ResultRow, Results, write_tables
from ablations.difficulty.tasks import read_problems
from ablations.difficulty.training import EARLY, PROBLEMS_FILE, REFERENCE, Study, read_study
from ablations.difficulty.verdict import verdict_text
from ablations.difficulty.windows import HeldOut, Windows, held_out
from corpus.prepare import PreparedCorpus, open_prepared
from foundation.files import write_text
from staged_training.record import read_run

DECILES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The counted tokens of the real text, and what is known of each before any method is looked at.

    Attributes:
        difficulties: by name; the loss of the reference model, and how much of its early loss it has learnt away.
        covariates: log frequency in the training text of the token the router sees and of the token to be predicted,
            position in the window.
        weights_RD: how often each resample draws each document, see `document_weights`.
    """

    windows: Windows
    difficulties: dict[str, np.ndarray]
    covariates: tuple[np.ndarray, ...]
    weights_RD: np.ndarray


def analyse(folder: Path, options: AnalysisOptions) -> Path:
    """Measures what `train` left in a folder and prints the verdict.

    Args:
        folder: of the study.
        options: how to measure.

    Returns:
        The folder of the results, `<folder>/analysis`.

    Raises:
        ValueError: where nothing was trained, or a number of experts does not fit the models.
    """
    study = read_study(folder)
    if not options.forced[0] <= study.k <= options.forced[-1]:
        raise ValueError(f"--forced {options.forced}: must enclose the models' k = {study.k}")
    corpus = open_prepared(folder / study.corpus)
    seq_len = read_run(folder / next(iter(study.runs.values()))).config["trunk"]["seq_len"]
    data = held_out(
        corpus,
        read_problems(folder / PROBLEMS_FILE),
        seq_len=seq_len,
        windows_per_document=options.windows_per_document,
    )
    tokens = describe_tokens(folder, study, data, token_counts(corpus), options)
    budgets = tuple(sorted({*options.budgets, study.k}))
    points = measure_frontier(folder, study, data, forced=options.forced, budgets=budgets)
    chosen = {point.weights: point for point in points if point.allocation == OWN and point.asked == study.k}
    results = Results(
        k=study.k,
        n_tokens=len(tokens.windows.targets_N),
        n_documents=tokens.weights_RD.shape[1],
        correlations=[
            row
            for name, point in chosen.items()
            for row in correlation_rows(name, point.observed, tokens, options.shuffles)
        ],
        structure=structure_rows(folder, study, data, options.resamples),
        deciles=[row for name, point in chosen.items() for row in decile_rows(name, point.observed, tokens)],
        regret=[regret_row(name, point, points, tokens) for name, point in chosen.items()],
        frontier=frontier_rows(points, tokens),
        differences=difference_rows(points, tokens),
    )
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    write_tables(results, out)
    draw(results, out / "figure.png")
    text = verdict_text(results)
    write_text(out / "verdict.txt", text)
    print(f"\n{text}\nresults: {out}", flush=True)
    return out


def token_counts(corpus: PreparedCorpus) -> np.ndarray:
    """How often each token occurs in the training text, int64 [V]."""
    return np.bincount(np.asarray(corpus.train.tokens[:]), minlength=corpus.tokenizer.vocab_size)


def describe_tokens(
    folder: Path, study: Study, data: HeldOut, counts_V: np.ndarray, options: AnalysisOptions
) -> Tokens:
    """The counted tokens with what is known of them before any method is looked at.

    Args:
        counts_V: how often each token occurs in the training text.
    """
    late, early = (observe_as(folder / study.models[name], data.text).nats_N for name in (REFERENCE, EARLY))
    # Plus one: a token of the held-out text may be missing in the training text.
    frequency_V = np.log(counts_V + 1)
    return Tokens(
        windows=data.text,
        difficulties={"reference_loss": late, "learnability": early - late},
        covariates=(frequency_V[data.text.inputs_N], frequency_V[data.text.targets_N], data.text.position_N),
        weights_RD=document_weights(int(data.text.document_W.max()) + 1, options.resamples),
    )


def correlation_rows(name: str, observed: Observed, tokens: Tokens, shuffles: int) -> list[ResultRow]:
    """Difficulty against experts, per layer and summed over layers."""
    experts_NL, document_N = observed.experts_NL, tokens.windows.document_N
    layers = [(str(layer), experts_NL[:, layer]) for layer in range(experts_NL.shape[1])]
    rows = []
    for difficulty, difficulty_N in tokens.difficulties.items():
        for layer, experts_N in (*layers, ("sum", experts_NL.sum(1))):
            plain = spearman(difficulty_N, experts_N, document_N, weights_RD=tokens.weights_RD)
            partial = spearman(
                difficulty_N, experts_N, document_N, given=tokens.covariates, weights_RD=tokens.weights_RD
            )
            null = matched_shuffle(difficulty_N, experts_N, tokens.covariates[0], shuffles=shuffles)
            low, high = np.quantile(null, (0.025, 0.975))
            shuffled = Bounded(value=float(null.mean()), low=float(low), high=float(high))
            row = {"method": name, "difficulty": difficulty, "layer": layer}
            rows.append(row | named("spearman", plain) | named("partial", partial) | named("shuffled", shuffled))
    return rows


def structure_rows(folder: Path, study: Study, data: HeldOut, resamples: int) -> list[ResultRow]:
    """On problems: the label against the mean experts of the tokens that predict the answer, a problem being one
    observation."""
    probes, windows = data.probes, data.probes.windows
    # Only the tokens that predict the answer count: the level says how hard that is, not how hard the question reads.
    answer_W = windows.document_N[probes.answer_N]
    size_W = np.bincount(answer_W, minlength=len(probes.level_W))

    def per_window(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(answer_W, weights=values_N[probes.answer_N], minlength=len(size_W)) / size_W

    loss_W = per_window(observe_as(folder / study.models[REFERENCE], windows).nats_N)
    position_W = per_window(windows.position_N.astype(float))
    rows = []
    for name in methods_of(study):
        observed = observe_as(folder / study.models[name], windows, own_policy(name, study.k, data.calibration_BT))
        experts_W = per_window(observed.experts_NL.mean(1))
        for task in sorted(set(probes.task_W)):
            here = probes.task_W == task
            weights_RD, documents = document_weights(int(here.sum()), resamples), np.arange(here.sum())
            level_W = probes.level_W[here]
            plain = spearman(level_W, experts_W[here], documents, weights_RD=weights_RD)
            partial = spearman(level_W, experts_W[here], documents, given=(position_W[here],), weights_RD=weights_RD)
            loss = spearman(level_W, loss_W[here], documents, weights_RD=weights_RD)
            numbers = named("given_position", partial) | named("level_vs_reference_loss", loss)
            row = {"method": name, "task": task, "problems": int(here.sum())}
            rows.append(row | named("spearman", plain) | numbers)
    return rows


def decile_rows(name: str, observed: Observed, tokens: Tokens) -> list[ResultRow]:
    """Mean experts in each tenth of the tokens by difficulty, easiest first."""
    rows = []
    for difficulty, difficulty_N in tokens.difficulties.items():
        for decile, members in enumerate(np.array_split(np.argsort(difficulty_N, kind="stable"), DECILES), 1):
            rows.append(
                {
                    "method": name,
                    "difficulty": difficulty,
                    "decile": decile,
                    "mean_difficulty": float(difficulty_N[members].mean()),
                    "mean_experts": float(observed.experts_NL[members].mean()),
                    "mean_nats": float(observed.nats_N[members].mean()),
                }
            )
    return rows


def regret_row(name: str, point: Point, points: list[Point], tokens: Tokens) -> ResultRow:
    """The share of the oracle's gain over the uniform allocation that other allocations take, from the losses of the
    same weights at forced k."""
    uniform = [other for other in points if other.weights == name and other.allocation == UNIFORM]
    ks = np.array([other.asked for other in uniform])
    loss_NK = np.stack([other.observed.nats_N for other in uniform], axis=1)
    used_N, document_N = point.observed.experts_NL.mean(1), tokens.windows.document_N
    # Clipped first: experts beyond the forced numbers are not priced, so the total that is compared must not hold them
    # either.
    used_N = np.clip(used_N, ks[0], ks[-1])
    mean = float(used_N.mean())
    allocations = {
        "own": used_N,
        "shuffled": np.random.default_rng(0).permutation(used_N),
        "by_reference_loss": by_difficulty(loss_NK, ks, mean, tokens.difficulties["reference_loss"], document_N),
        "oracle": best_allocation(loss_NK, ks, mean),
    }
    even_N = loss_at(loss_NK, ks, np.full(len(used_N), mean))
    gain_D = {
        which: _document_gain(even_N - loss_at(loss_NK, ks, experts_N), tokens)
        for which, experts_N in allocations.items()
    }
    shares = {
        which: ratio(gain_D[which], gain_D["oracle"], tokens.weights_RD) for which in allocations if which != "oracle"
    }
    numbers = {key: value for which, share in shares.items() for key, value in named(which, share).items()}
    means = {f"{which}_mean_experts": float(experts_N.mean()) for which, experts_N in allocations.items()}
    row = {
        "method": name,
        "mean_experts": mean,
        "uniform_nats": float(even_N.mean()),
        "oracle_gain_nats": gain_D["oracle"].sum() / len(even_N),
    }
    return row | numbers | means


def _document_gain(gain_N: np.ndarray, tokens: Tokens) -> np.ndarray:
    return document_sums(gain_N, tokens.windows.document_N, tokens.weights_RD.shape[1])


def frontier_rows(points: list[Point], tokens: Tokens) -> list[ResultRow]:
    """Every point: experts asked for and used, and bits per byte of the real text."""
    rows = []
    for point in points:
        mean = point.observed.mean_experts
        row = {"weights": point.weights, "allocation": point.allocation, "asked": point.asked, "mean_experts": mean}
        bits = frontier.bits_per_byte(point, tokens.windows, tokens.weights_RD)
        rows.append(row | {"error_percent": 100 * (mean / point.asked - 1)} | named("bits_per_byte", bits))
    return rows


def difference_rows(points: list[Point], tokens: Tokens) -> list[ResultRow]:
    """Each own allocation minus its rivals at the same number of experts, in bits per byte; negative is better."""
    rows = []
    for point in points:
        for rival in frontier.rivals(point, points) if point.allocation == OWN else ():
            bits = frontier.difference(point, rival, tokens.windows, tokens.weights_RD)
            row = {
                "weights": point.weights,
                "asked": point.asked,
                "mean_experts": point.observed.mean_experts,
                "against": rival.weights,
                "against_allocation": rival.allocation,
                "against_mean_experts": rival.observed.mean_experts,
            }
            rows.append(row | named("difference", bits))
    return rows


def named(name: str, number: Bounded) -> ResultRow:
    """A number and the bounds of its interval, as three columns."""
    return {name: number.value, f"{name}_low": number.low, f"{name}_high": number.high}
