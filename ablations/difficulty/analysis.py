"""From trained models to the answer: do harder tokens get more experts, and does that pay? Everything is computed on
held-out documents.

`analyse` writes correlations.csv, structure.csv, deciles.csv, frontier.csv, differences.csv, verdict.txt
and figure.png.

Legend: N tokens of real text, K forced numbers of experts, W windows, R resamples, D documents.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ablations.difficulty import frontier
from ablations.difficulty.controls import control_basis
from ablations.difficulty.correlations import (
    Bounded,
    bounded,
    document_sums,
    document_weights,
    matched_shuffle,
    pooled,
    resampled_spearman,
    spearman,
)
from ablations.difficulty.figure import draw
from ablations.difficulty.frontier import OWN, Point, measure_frontier, methods_of, own_policy
from ablations.difficulty.observe import Observed, observe_as
from ablations.difficulty.options import AnalysisOptions
from ablations.difficulty.results import ResultRow, Results, write_tables
from ablations.difficulty.scale import Scale
from ablations.difficulty.tasks import read_problems
from ablations.difficulty.training import EARLY, PROBLEMS_FILE, RANDOM_K, REFERENCE, Study, read_study
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
        frequency_N: log frequency in the training text of the token the router sees.
        basis_NP: what is held fixed: that frequency, the one of the token to be predicted, position in the window,
            domain.
        weights_RD: how often each resample draws each document, see `document_weights`.
    """

    windows: Windows
    difficulties: dict[str, np.ndarray]
    frequency_N: np.ndarray
    basis_NP: np.ndarray
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
    found = {name: correlations(point.observed, tokens, options.shuffles) for name, point in chosen.items()}
    results = Results(
        k=study.k,
        n_tokens=len(tokens.windows.targets_N),
        n_documents=tokens.weights_RD.shape[1],
        methods={name: study.method_of(name) for name in study.runs},
        correlations=[
            row
            for label, names in labels(study, list(chosen)).items()
            for row in correlation_rows(label, [found[name] for name in names])
        ],
        structure=structure_rows(folder, study, data, options.resamples),
        deciles=[row for name, point in chosen.items() for row in decile_rows(name, point.observed, tokens)],
        frontier=frontier_rows(points, tokens),
        differences=[*difference_rows(study, points, tokens), *pooled_difference_rows(study, points, tokens)],
    )
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    write_tables(results, out)
    draw(results, out / "figure.png")
    text = verdict_text(results)
    write_text(out / "verdict.txt", text)
    print(f"\n{text}\nresults: {out}", flush=True)
    print(
        "what allocations are worth at equal compute: python -m ablations counterfactual --run",
        *(str(folder / run) for run in seeds_of_one(study)),
    )
    return out


def seeds_of_one(study: Study) -> list[str]:
    """Run folders of one method, all its seeds: the first that chooses by its own trained policy."""
    names = [name for name in methods_of(study) if study.method_of(name) != RANDOM_K]
    return [study.runs[name] for name in names if study.method_of(name) == study.method_of(names[0])]


def labels(study: Study, names: Sequence[str]) -> dict[str, list[str]]:
    """What is reported on, and the runs behind it: every run, and every method of several seeds."""
    by_method: dict[str, list[str]] = {}
    for name in names:
        by_method.setdefault(study.method_of(name), []).append(name)
    several = {f"{method}, {len(own)} seeds": own for method, own in by_method.items() if len(own) > 1}
    return {name: [name] for name in names} | several


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
    seen_N, predicted_N = frequency_V[data.text.inputs_N], frequency_V[data.text.targets_N]
    return Tokens(
        windows=data.text,
        difficulties={"reference_loss": late, "learnability": early - late},
        frequency_N=seen_N,
        basis_NP=control_basis((seen_N, predicted_N, data.text.position_N, data.domain_D[data.text.document_N])),
        weights_RD=document_weights(int(data.text.document_W.max()) + 1, options.resamples),
    )


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Of difficulty with experts in one layer, or their sum: plain and partial with their resamples, [R], and the
    frequency-matched null."""

    plain: tuple[float, np.ndarray]
    partial: tuple[float, np.ndarray]
    null: np.ndarray


def correlations(observed: Observed, tokens: Tokens, shuffles: int) -> dict[tuple[str, str], Correlation]:
    """Difficulty against experts, by difficulty and layer, and summed over layers."""
    experts_NL, document_N = observed.experts_NL, tokens.windows.document_N
    layers = [(str(layer), experts_NL[:, layer]) for layer in range(experts_NL.shape[1])]
    found = {}
    for difficulty, difficulty_N in tokens.difficulties.items():
        for layer, experts_N in (*layers, ("sum", experts_NL.sum(1))):
            plain, partial = (
                resampled_spearman(difficulty_N, experts_N, document_N, basis_NP=basis_NP, weights_RD=tokens.weights_RD)
                for basis_NP in (None, tokens.basis_NP)
            )
            null = matched_shuffle(difficulty_N, experts_N, tokens.frequency_N, shuffles=shuffles)
            found[difficulty, layer] = Correlation(plain=plain, partial=partial, null=null)
    return found


def correlation_rows(label: str, runs: Sequence[dict[tuple[str, str], Correlation]]) -> list[ResultRow]:
    """Rows of one run, or of the mean of several."""
    rows = []
    for difficulty, layer in runs[0]:
        own = [run[difficulty, layer] for run in runs]
        low, high = np.quantile([one.null for one in own], (0.025, 0.975))
        shuffled = Bounded(value=float(np.mean([one.null for one in own])), low=float(low), high=float(high))
        row = {"method": label, "difficulty": difficulty, "layer": layer}
        for name in ("plain", "partial"):
            values, draws = zip(*(getattr(one, name) for one in own))
            number = pooled(values, draws) if len(own) > 1 else bounded(values[0], draws[0])
            row |= named("spearman" if name == "plain" else name, number)
        rows.append(row | named("shuffled", shuffled))
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
        observed = observe_as(
            folder / study.models[name], windows, own_policy(study.method_of(name), study.k, data.calibration_BT)
        )
        experts_W = per_window(observed.experts_NL.mean(1))
        for task in sorted(set(probes.task_W)):
            here = probes.task_W == task
            weights_RD, documents = document_weights(int(here.sum()), resamples), np.arange(here.sum())
            level_W = probes.level_W[here]
            plain = spearman(level_W, experts_W[here], documents, weights_RD=weights_RD)
            basis = control_basis((position_W[here],))
            partial = spearman(level_W, experts_W[here], documents, basis_NP=basis, weights_RD=weights_RD)
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


def frontier_rows(points: list[Point], tokens: Tokens) -> list[ResultRow]:
    """Every point: experts asked for and used, and bits per byte of the real text."""
    rows = []
    for point in points:
        mean = point.observed.mean_experts
        row = {"weights": point.weights, "allocation": point.allocation, "asked": point.asked, "mean_experts": mean}
        bits = frontier.bits_per_byte(point, tokens.windows, tokens.weights_RD)
        rows.append(row | {"error_percent": 100 * (mean / point.asked - 1)} | named("bits_per_byte", bits))
    return rows


def pairs_of(study: Study, points: list[Point]) -> list[tuple[Point, Point]]:
    """Each own allocation with each of its rivals of the same seed, at the same number of experts asked for."""
    return [
        (point, rival)
        for point in points
        if point.allocation == OWN
        for rival in frontier.rivals(point, points)
        if study.seed_of(rival.weights) == study.seed_of(point.weights)
    ]


def difference_rows(study: Study, points: list[Point], tokens: Tokens) -> list[ResultRow]:
    """Each own allocation minus its rivals, in bits per byte; negative is better."""
    rows = []
    for point, rival in pairs_of(study, points):
        bits = frontier.difference(point, rival, tokens.windows, tokens.weights_RD)
        rows.append(_difference_row(point.weights, rival.weights, [(point, rival)], bits))
    return rows


def pooled_difference_rows(study: Study, points: list[Point], tokens: Tokens) -> list[ResultRow]:
    """The same of every method that has several seeds."""
    groups: dict[tuple, list[tuple[Point, Point]]] = {}
    for point, rival in pairs_of(study, points):
        names = study.method_of(point.weights), study.method_of(rival.weights)
        groups.setdefault((*names, rival.allocation, point.asked), []).append((point, rival))
    windows, n_documents = tokens.windows, tokens.weights_RD.shape[1]
    n_bytes_D = document_sums(windows.n_bytes_N, windows.document_N, n_documents)
    rows = []
    for (method, against, *_), pairs in groups.items():
        if len(pairs) < 2:
            continue
        nats_UN = [point.observed.nats_N - rival.observed.nats_N for point, rival in pairs]
        bits_UD = np.stack([document_sums(nats_N, windows.document_N, n_documents) for nats_N in nats_UN]) / math.log(2)
        # The seeds' own noise is in it: nothing is resampled.
        bits = Scale(n_bytes_D=n_bytes_D, resamples=1, seed=0).gain(bits_UD)
        rows.append(_difference_row(f"{method}, {len(pairs)} seeds", against, pairs, bits))
    return rows


def _difference_row(weights: str, against: str, pairs: list[tuple[Point, Point]], bits: Bounded) -> ResultRow:
    point, rival = pairs[0]
    row = {
        "weights": weights,
        "asked": point.asked,
        "mean_experts": float(np.mean([own.observed.mean_experts for own, _ in pairs])),
        "against": against,
        "against_allocation": rival.allocation,
        "against_mean_experts": float(np.mean([other.observed.mean_experts for _, other in pairs])),
    }
    return row | named("difference", bits)


def named(name: str, number: Bounded) -> ResultRow:
    """A number and the bounds of its interval, as three columns."""
    return {name: number.value, f"{name}_low": number.low, f"{name}_high": number.high}
