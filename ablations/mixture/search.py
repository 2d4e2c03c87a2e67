"""`python -m ablations mixture`: small runs on many mixtures, a regression from mixture to losses, the best mixture
under epoch caps, and runs of the model that say whether it is better than the natural and the uniform one.

Legend: N mixtures, D domains, F folds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from ablations.mixture.figure import draw
from ablations.mixture.options import MACRO, TARGET, MixtureSearchOptions
from ablations.mixture.proxies import Measure, NgramProxy, draw_mixtures, run_proxies, within_caps
from ablations.mixture.rows import FitRow, ShareRow
from ablations.text.differences import DifferenceRow, TextRow, difference_text, differences
from ablations.text.runs import train_whole
from corpus.mixture import LINEAR, PROCESS, GaussianProcess, LinearRegression, Runs
from corpus.prepare import PreparedCorpus, prepare
from corpus.shares import NATURAL, UNIFORM, capped, read_shares
from foundation.command import leave_options
from foundation.files import fingerprint
from foundation.serialize import nearest
from foundation.tables import write_rows, write_table
from staged_training.code import code_behind
from staged_training.staging import StagingConfig, corpus_facts, make_whole_plan, mixed_text

BEST = "best"
ARMS = (BEST, NATURAL, UNIFORM)
# Mixtures whose losses are predicted, and how many of the lowest are averaged: RegMix's way past the noise of a fit.
CANDIDATES, AVERAGED = 50_000, 64
FOLDS = 5
SHARES_FILE, AGREEMENT_FILE, RUNS_FILE, DIFFERENCES_FILE, FIGURE = (
    "shares.csv",
    "agreement.csv",
    "runs.csv",
    "differences.csv",
    "figure.png",
)


def search(options: MixtureSearchOptions) -> None:
    """Searches, verifies, prints, and leaves tables and figure in `out`; what is finished is not run again.

    Raises:
        ValueError: for text, target, model or staging that do not fit.
        foundation.stopping.Interrupted: everything saved; the same call continues.
    """
    corpus = prepare(options.corpus, options.out / "corpus")
    leave_options(options.out)
    tokens = corpus.domain_tokens()
    domains = tuple(tokens)
    check_domains(options, domains, corpus)
    n = options.staging.tokens
    cap = math.inf if options.staging.epoch_cap is None else options.staging.epoch_cap
    most_D = np.array([min(cap * count / n, 1.0) for count in tokens.values()])
    named = {name: capped(read_shares(name, tokens), tokens, length=n, cap=cap) for name in (NATURAL, UNIFORM)}
    mixture_ND = draw_mixtures(tokens, options.proxies, options.seed, most_D)
    folder = options.out / proxy_folder(options, corpus, most_D)
    runs = run_proxies(domains, mixture_ND, small_run(options, corpus), folder)
    rows = cross_validate(runs)
    write_rows(options.out / AGREEMENT_FILE, FitRow, rows)
    print(f"\n{fit_text(rows)}\n")
    process = GaussianProcess(runs)
    best_D = best_mixture(process, tokens, most_D, options)
    arms = {BEST: dict(zip(domains, best_D.tolist())), **named}
    shares = share_rows(arms, tokens, process, options)
    write_rows(options.out / SHARES_FILE, ShareRow, shares)
    write_table(options.out / f"{BEST}.csv", ("domain", "share"), list(arms[BEST].items()))
    print(
        f"{share_text(shares, domains, options.aim)}\n\nthe best one for --mixture: {options.out / f'{BEST}.csv'}",
        flush=True,
    )
    if not options.seeds:
        return
    done: list[TextRow] = []
    for seed in range(options.seeds):
        for name in ARMS:
            print(f"\n{name}, seed {seed}", flush=True)
            found = train(options, options.staging, corpus, arms[name], seed=seed)
            if options.aim == TARGET:
                found = {**found, TARGET: float(np.mean([found[domain] for domain in options.target]))}
            done += [TextRow(name, seed, domain, value) for domain, value in found.items()]
            write_rows(options.out / RUNS_FILE, TextRow, done)
    against = differences(done, [(BEST, other) for other in ARMS[1:]])
    write_rows(options.out / DIFFERENCES_FILE, DifferenceRow, against)
    draw(shares, against, options.out / FIGURE)
    print(f"\n{difference_text(done, against)}\n\ntables and figure: {options.out}")


def check_domains(options: MixtureSearchOptions, domains: tuple[str, ...], corpus: PreparedCorpus) -> None:
    """Refuses text of one domain, domains without held-out documents, and a target that is none of them."""
    if len(domains) < 2:
        raise ValueError(f"--data: the training text has one domain, {''.join(domains)}; legal: two at least")
    if missing := sorted(set(domains) ^ set(corpus.valid_domains())):
        raise ValueError(
            f"--valid-documents, --valid-share: {', '.join(missing[:5])} not in both training and validation text;"
            " legal: more of the documents, or more documents"
        )
    for name in options.target:
        if name not in (domains if options.aim == TARGET else (MACRO,)):
            raise ValueError(f"--target {name}: {nearest(name, (MACRO, *domains))}; macro stands alone")


def small_run(options: MixtureSearchOptions, corpus: PreparedCorpus) -> Measure:
    """What is trained on every mixture that is tried."""
    if options.proxy == "ngram":
        return NgramProxy(corpus=corpus, order=options.order, tokens=options.proxy_tokens, valid=options.proxy_valid)
    staging = dataclasses.replace(options.staging, tokens=options.proxy_tokens)
    return lambda shares: train(options, staging, corpus, shares, seed=0)


def proxy_folder(options: MixtureSearchOptions, corpus: PreparedCorpus, most_D: np.ndarray) -> str:
    """Named by all that small runs depend on."""
    asked = [corpus.train.fingerprint(), corpus.valid.fingerprint(), options.proxy, options.proxy_tokens]
    asked += [options.seed, most_D.tolist()]
    if options.proxy == "ngram":
        asked += [options.order, options.proxy_valid]
    else:
        model = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
        staging = dataclasses.replace(options.staging, tokens=options.proxy_tokens)
        asked += [dataclasses.asdict(staging), dataclasses.asdict(options.model), code_behind(model)]
    return f"proxies_{fingerprint(asked)[:12]}"


def train(
    options: MixtureSearchOptions,
    staging: StagingConfig,
    corpus: PreparedCorpus,
    shares: Mapping[str, float],
    *,
    seed: int,
) -> dict[str, float]:
    """Bits per byte of the model by domain, trained on a mixture now or before, see `train_whole`."""
    mixed = mixed_text(corpus, staging, shares)
    staging = dataclasses.replace(staging, mixture="given", epoch_cap=None)
    model = options.model.config(corpus.tokenizer.vocab_size, corpus.tokenizer.boundary_id)
    plan = make_whole_plan(staging, corpus_facts(mixed), model, seed=seed)
    return train_whole(plan, mixed, options.out, options.execution, corpus.valid_domains())


def cross_validate(runs: Runs) -> list[FitRow]:
    """Of every regression and loss; each run is predicted from the other folds."""
    fold_N = np.arange(len(runs)) % FOLDS
    rows: list[FitRow] = []
    for name, kind in ((LINEAR, LinearRegression), (PROCESS, GaussianProcess)):
        predicted_NV = np.empty_like(runs.loss_NV)
        for fold in range(FOLDS):
            kept_N = fold_N != fold
            learnt = dataclasses.replace(runs, mixture_ND=runs.mixture_ND[kept_N], loss_NV=runs.loss_NV[kept_N])
            predicted_NV[~kept_N] = kind(learnt).predict(runs.mixture_ND[~kept_N])
        pairs = [*zip(runs.losses, predicted_NV.T, runs.loss_NV.T)]
        pairs.append((MACRO, predicted_NV.mean(axis=1), runs.loss_NV.mean(axis=1)))
        for loss, predicted_N, measured_N in pairs:
            rank = float(scipy.stats.spearmanr(predicted_N, measured_N)[0])  # pyright: ignore[reportArgumentType]
            rows.append(FitRow(loss, name, rank, float(np.sqrt(np.mean((predicted_N - measured_N) ** 2)))))
    return rows


def best_mixture(
    process: GaussianProcess, tokens: Mapping[str, int], most_D: np.ndarray, options: MixtureSearchOptions
) -> np.ndarray:
    """The mean of the mixtures that are predicted to have the lowest target: shares [D], none above its largest."""
    candidate_ND = draw_mixtures(tokens, CANDIDATES, options.seed + 1, most_D)
    predicted_NV = process.predict(candidate_ND)
    target_N = predicted_NV[:, options.aimed_at(list(tokens))].mean(axis=1)
    best_D = candidate_ND[np.argsort(target_N, kind="stable")[:AVERAGED]].mean(axis=0)
    return within_caps(best_D[None] / best_D.sum(), most_D)[0]


def share_rows(
    arms: Mapping[str, Mapping[str, float]],
    tokens: Mapping[str, int],
    process: GaussianProcess,
    options: MixtureSearchOptions,
) -> list[ShareRow]:
    n, aimed = options.staging.tokens, options.aimed_at(list(tokens))
    predicted_NV = process.predict(np.array([list(shares.values()) for shares in arms.values()]))
    rows = []
    for (name, shares), predicted_V in zip(arms.items(), predicted_NV):
        rows += [
            ShareRow(name, domain, share, share * n / tokens[domain], float(predicted))
            for (domain, share), predicted in zip(shares.items(), predicted_V)
        ]
        predicted = float(predicted_V[aimed].mean())
        rows.append(ShareRow(name, options.aim, 1.0, n / sum(tokens.values()), predicted))
    return rows


def fit_text(rows: Sequence[FitRow]) -> str:
    found = {(row.loss, row.regression): row for row in rows}
    lines = [f"{'loss, small runs left out':<28}{LINEAR:>9}{PROCESS:>18}{'its error':>11}"]
    for loss in dict.fromkeys(row.loss for row in rows):
        linear, process = found[loss, LINEAR], found[loss, PROCESS]
        lines.append(f"{loss:<28}{linear.spearman:>9.4f}{process.spearman:>18.4f}{process.error:>11.4f}")
    return "\n".join(lines)


def share_text(rows: Sequence[ShareRow], domains: Sequence[str], aim: str) -> str:
    found = {(row.mixture, row.domain): row for row in rows}
    names = list(dict.fromkeys(row.mixture for row in rows))
    lines = [f"{'domain':<20}" + "".join(f"{f'{name}, passes':>20}" for name in names)]
    for domain in domains:
        cells = [f"{found[name, domain].share:>12.2%}{found[name, domain].passes:>8.2f}" for name in names]
        lines.append(f"{domain:<20}" + "".join(cells))
    predicted = [f"{found[name, aim].predicted:>20.4f}" for name in names]
    return "\n".join([*lines, f"{f'predicted {aim}':<20}" + "".join(predicted)])
