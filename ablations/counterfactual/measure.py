"""One trained model under every allocation of the same total, each by a real forward over the held-out text.

Legend: N counted tokens, L layers with more than one expert, K numbers of experts, D documents.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch

from ablations.counterfactual.allocations import (
    Counts,
    by_gains,
    by_rank,
    even,
    same_in_every_layer,
    shuffled_by_layer,
    shuffled_by_token,
    shuffled_in_documents,
)
from ablations.counterfactual.cross_fit import by_cross_fitted_gains, cross_fitted_gains
from ablations.counterfactual.gains import Gains, measure_gains, routed_layers, slots_of
from ablations.counterfactual.options import CounterfactualOptions
from ablations.counterfactual.text import Text
from ablations.difficulty.observe import Observed, observe
from foundation.serialize import from_dict
from lm.budget import set_budget
from lm.model import LanguageModel
from lm.pretrained import find_model, load_calibration_tokens, load_pretrained
from routing.policies.top_k import TopK
from routing.router import RouterConfig

EVEN, OWN, ORACLE, HINDSIGHT = "even", "own", "oracle", "hindsight"
REPLAYED, LAYERS = "replayed", "even by layer"
NULLS = ("shuffled by layer", "shuffled by token", "shuffled in documents")
FREQUENCY, FREQUENCY_GAINS, GREEDY = "by frequency", "by frequency's gains", "greedy"
FREQUENCY_BINS = 20

# What each allocation is, for tables and verdicts.
MEANING = {
    EVEN: "the same number for every token and layer",
    LAYERS: "each layer's mean, the same for every token",
    OWN: "the policy's own choice",
    REPLAYED: "the same numbers, given from outside: what giving them changes",
    NULLS[0]: "the policy's numbers dealt out among all tokens, layer by layer",
    NULLS[1]: "tokens exchange their numbers of all layers",
    NULLS[2]: "tokens of one document do",
    FREQUENCY: "the policy's numbers, the most to the tokens rarest in training text",
    FREQUENCY_GAINS: "by what tokens of like frequency gain in other documents",
    GREEDY: "by cross-fitted gains, to whom the next step gains most",
    ORACLE: "by cross-fitted gains, the best",
    HINDSIGHT: "by each token's own measured gains, its luck included",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One run.

    Attributes:
        name: of the run.
        runs: by allocation, in the order of `MEANING`; those that need the policy's own numbers are missing where it
            gives every token the same.
        layer_runs: by layer: `EVEN` (each layer's mean, the same for every token) and, with that layer alone changed,
            `OWN` and `ORACLE`.
        gains: what the oracle was made of.
    """

    name: str
    runs: dict[str, Observed]
    layer_runs: dict[int, dict[str, Observed]]
    gains: Gains


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A model, the text, and the layers in which there is something to allocate."""

    model: LanguageModel
    text: Text
    layers: list[int]

    @property
    def n_tokens(self) -> int:
        return len(self.text.frequency_N)

    def run(self, counts_NL: Counts) -> Observed:
        """One pass with these numbers in the layers that have a choice."""
        return observe(self.model, self.text.windows, counts_NL=self.whole(counts_NL))

    def whole(self, counts_NL: Counts) -> Counts:
        """The numbers with a column for every block."""
        whole_NL = np.ones((len(counts_NL), self.model.config.n_layers), dtype=np.int64)
        whole_NL[:, self.layers] = counts_NL
        return whole_NL


def measure(name: str, run: Path, text: Text, options: CounterfactualOptions) -> Measured:
    """Runs a trained model under every allocation.

    Args:
        name: what tables call it.
        run: folder of the model, or of the run that trained it.

    Raises:
        ValueError: for a model without a layer to allocate in, a policy that cannot evaluate, numbers of experts that
            do not fit it, or one that does not take them.
    """
    folder = find_model(run)
    model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
    prepare_policy(model, folder, options)
    return measure_model(name, model, text, options)


def prepare_policy(model: LanguageModel, folder: Path, options: CounterfactualOptions) -> None:
    """Gives the model the policy and the mean that are asked for; thresholds are set on the calibration text that lies
    in its folder, which is not measured."""
    if options.policy:
        try:
            stored = json.loads(options.policy)
        except json.JSONDecodeError as error:
            raise ValueError(f"--policy {options.policy!r} is not JSON: {error}") from None
        model.set_policy(from_dict(RouterConfig, {"policy": stored}, place="--policy").policy)
    policies = [router.policy for router in model.routers() if router.n_experts > 1]
    for policy in policies:
        if policy.config.needs_whole_batch:
            raise ValueError(f"{type(policy.config).__name__} looks at later tokens: set another one with --policy")
    if all(policy.budget is None for policy in policies):
        return
    mean = options.mean
    if mean is None and options.policy:
        mean = policies[0].config.held_mean
    if mean is not None:
        set_budget(model, mean, load_calibration_tokens(folder).to(model.embedding_VD.device))


def measure_model(name: str, model: LanguageModel, text: Text, options: CounterfactualOptions) -> Measured:
    """`measure` of a model that has the policy asked for; it may be left with another one."""
    bench = Bench(model=model, text=text, layers=list(routed_layers(model)))
    if not bench.layers:
        raise ValueError(f"{name}: every layer has a single expert, there is nothing to allocate")
    # Blocks below a frozen boundary keep the trunk's policy.
    names = [type(model.routers()[layer].policy.config).__name__ for layer in bench.layers]
    policy = ", ".join(dict.fromkeys(names))
    own = observe(model, text.windows)
    own_NL = own.experts_NL[:, bench.layers].astype(np.int64)
    chooses = bool((own_NL != own_NL[:1]).any())
    if not chooses and options.mean is not None:
        own_NL = even(bench.n_tokens, same_in_every_layer(round(options.mean * own_NL.size), len(bench.layers)))
    total = int(own_NL.sum())
    widen(bench, options, total / own_NL.size)
    ks = forced_numbers(model, options, own_NL.mean(0))
    even_NL = even(bench.n_tokens, same_in_every_layer(total, len(bench.layers)))
    n_passes = len(bench.layers) * (len(ks) + 2)
    print(
        f"{name}: {policy}, {total / own_NL.size:.3f} experts; {n_passes} passes for {ks.tolist()} experts in each of"
        f" {len(bench.layers)} layers",
        flush=True,
    )
    gains = measure_gains(model, text.windows, bench.whole(even_NL), ks)
    predicted_NLK = cross_fitted_gains(
        gains.feature_NLP, gains.gain_NLK, text.windows.document_N, ks, total / own_NL.size
    )
    runs = {EVEN: gains.even}
    if chooses:
        runs[OWN] = own
        for allocation, counts_NL in from_own(own_NL, text, options.seed).items():
            runs[allocation] = bench.run(counts_NL)
    for allocation, counts_NL in from_gains(gains, predicted_NLK, text, total).items():
        runs[allocation] = bench.run(counts_NL)
    return Measured(
        name=name,
        runs={allocation: runs[allocation] for allocation in MEANING if allocation in runs},
        layer_runs=layer_runs(bench, own_NL if chooses else None, predicted_NLK, ks, own_NL.sum(0)),
        gains=gains,
    )


def widen(bench: Bench, options: CounterfactualOptions, mean: float) -> None:
    """Gives layers of a fixed number of experts the slots that will be asked for: the widest number that is forced, as
    many as layers that choose have, or, where none does, twice the mean."""
    routers = {layer: bench.model.routers()[layer] for layer in bench.layers}
    fixed = {layer: router for layer, router in routers.items() if not router.policy.config.varies_by_token}
    choosing = [slots for layer, slots in slots_of(bench.model).items() if layer not in fixed]
    widest = max(options.forced, default=max(choosing, default=2 * math.ceil(mean)))
    for router in fixed.values():
        same = router.policy.config if isinstance(router.policy.config, TopK) else TopK()
        most = router.n_experts // same.n_groups * same.top_groups
        router.set_policy(dataclasses.replace(same, k=min(widest, most)))


def forced_numbers(model: LanguageModel, options: CounterfactualOptions, mean_L: np.ndarray) -> np.ndarray:
    """The grid of numbers of experts, ascending int64 [K].

    Raises:
        ValueError: where they go beyond the slots of a layer, or do not enclose a layer's mean.
    """
    slots = min(slots_of(model).values())
    # Beside the mean, too: between two numbers of the grid a gain is taken to be a straight line.
    near = math.floor(mean_L.mean()), math.ceil(mean_L.mean())
    ks = options.forced or sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, *near) if 1 <= k < slots} | {slots})
    if ks[-1] > slots:
        raise ValueError(f"--forced {' '.join(map(str, ks))}: a token gets at most {slots} experts here")
    if not (ks[0] <= mean_L.min() and mean_L.max() <= ks[-1]):
        raise ValueError(
            f"--forced {' '.join(map(str, ks))}: must enclose the layers' means, {mean_L.min():g} to {mean_L.max():g}"
            " experts"
        )
    return np.array(ks, dtype=np.int64)


def from_own(own_NL: Counts, text: Text, seed: int) -> dict[str, Counts]:
    """Allocations with the policy's own numbers, and the even one of each layer's own mean."""
    return {
        LAYERS: even(len(own_NL), own_NL.sum(0)),
        REPLAYED: own_NL,
        NULLS[0]: shuffled_by_layer(own_NL, seed),
        NULLS[1]: shuffled_by_token(own_NL, seed),
        NULLS[2]: shuffled_in_documents(own_NL, text.windows.document_N, seed),
        FREQUENCY: by_rank(own_NL, -text.frequency_N),
    }


def from_gains(gains: Gains, predicted_NLK: np.ndarray, text: Text, total: int) -> dict[str, Counts]:
    """Allocations made of measured gains: all but the last know nothing of a document that they are measured on."""
    edges = np.unique(np.quantile(text.frequency_N, np.linspace(0, 1, FREQUENCY_BINS + 1)[1:-1]))
    bin_NB = np.eye(len(edges) + 1)[np.searchsorted(edges, text.frequency_N, side="right")]
    bin_NLB = np.repeat(bin_NB[:, None], len(gains.layers), axis=1)
    mean, document_N = total / gains.gain_NLK[..., 0].size, text.windows.document_N
    by_frequency_NLK = cross_fitted_gains(bin_NLB, gains.gain_NLK, document_N, gains.ks, mean)
    return {
        FREQUENCY_GAINS: by_cross_fitted_gains(by_frequency_NLK, gains.ks, total, document_N),
        GREEDY: by_cross_fitted_gains(predicted_NLK, gains.ks, total, document_N, greedy=True),
        ORACLE: by_cross_fitted_gains(predicted_NLK, gains.ks, total, document_N),
        HINDSIGHT: by_gains(gains.gain_NLK.astype(np.float64), gains.ks, total),
    }


def layer_runs(
    bench: Bench, own_NL: Counts | None, predicted_NLK: np.ndarray, ks: np.ndarray, totals_L: np.ndarray
) -> dict[int, dict[str, Observed]]:
    """Every layer alone, at the total that the policy gives it, all others even."""
    base_NL = even(bench.n_tokens, totals_L)
    base = bench.run(base_NL)
    found = {}
    for place, layer in enumerate(bench.layers):
        column_N1K, document_N = predicted_NLK[:, [place]], bench.text.windows.document_N
        changed = {ORACLE: by_cross_fitted_gains(column_N1K, ks, int(totals_L[place]), document_N)}
        if own_NL is not None:
            changed[OWN] = own_NL[:, [place]]
        found[layer] = {EVEN: base}
        for allocation, column_N1 in changed.items():
            counts_NL = base_NL.copy()
            counts_NL[:, [place]] = column_N1
            found[layer][allocation] = bench.run(counts_NL)
    return found
