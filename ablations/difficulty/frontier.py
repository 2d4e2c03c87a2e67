"""The frontier: bits per byte against the mean number of experts, for the same weights under several allocations and
for weights trained at each k.

Legend: N counted tokens, D documents, R resamples.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from ablations.difficulty.correlations import Bounded, document_sums, ratio
from ablations.difficulty.observe import Observed, observe_as
from ablations.difficulty.training import RANDOM_K, Study
from ablations.difficulty.windows import HeldOut, Windows
from lm.budget import set_budget
from lm.model import LanguageModel
from routing.policies.random_k import RandomK
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP

# How the experts of a point were allocated.
UNIFORM, OWN, RANDOM, TRAINED = "uniform", "own", "random", "trained at this k"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Weights run with one allocation.

    Attributes:
        weights: name of the trained model.
        allocation: `UNIFORM`: the same number for every token; `OWN`: the method's choice; `RANDOM`: that choice dealt
            out anew among the tokens;
            `TRAINED`: uniform, by a static model trained at this number.
        asked: mean experts per token and layer that were asked for.
        observed: every counted token's loss and experts.
    """

    weights: str
    allocation: str
    asked: float
    observed: Observed


def methods_of(study: Study) -> list[str]:
    """The trained models that can use another number of experts for every token."""
    return [name for name in study.runs if name not in study.static]


def own_policy(name: str, mean_experts: float, calibration_BT: Tensor) -> Callable[[LanguageModel], object]:
    """Sets the policy that a method chooses with.

    Args:
        name: of the method; weights trained with a random k choose by top-p after training.
        mean_experts: per token and layer, which its thresholds are set to hold.
        calibration_BT: held-out text that they are set on, which is not measured.

    Returns:
        A function that changes a model in place.
    """

    def change(model: LanguageModel) -> None:
        if name == RANDOM_K:
            policy = model.config.moe.router.policy
            assert isinstance(policy, RandomK)
            model.set_policy(TopP(target_mean=mean_experts, cap=policy.k_max))
        set_budget(model, mean_experts, calibration_BT)

    return change


def measure_frontier(
    folder: Path, study: Study, data: HeldOut, *, forced: tuple[int, ...], budgets: tuple[int, ...]
) -> list[Point]:
    """Runs every trained model over the held-out text, once per point.

    Args:
        folder: of the study.
        forced: experts per token at which every method's weights are run uniformly.
        budgets: means at which they are run by their own and by a random allocation.

    Returns:
        The points, the static models' at the k they were trained at among them.
    """
    points = []
    for name in study.runs:
        model_folder = folder / study.models[name]
        print(f"measuring {name}", flush=True)
        if name in study.static:
            observed = observe_as(model_folder, data.text)
            points.append(Point(weights=name, allocation=TRAINED, asked=study.static[name], observed=observed))
            continue
        for k in forced:
            observed = observe_as(model_folder, data.text, lambda model, k=k: model.set_policy(TopK(k=k)))
            points.append(Point(weights=name, allocation=UNIFORM, asked=k, observed=observed))
        for mean in budgets:
            change = own_policy(study.method_of(name), mean, data.calibration_BT)
            own = observe_as(model_folder, data.text, change)
            # Tokens exchange their numbers of all layers: one that gets many in one layer still does in the others.
            dealt_NL = np.random.default_rng(0).permutation(own.experts_NL)
            random = observe_as(model_folder, data.text, change, counts_NL=dealt_NL)
            points += [
                Point(weights=name, allocation=allocation, asked=mean, observed=observed)
                for allocation, observed in ((OWN, own), (RANDOM, random))
            ]
    return points


def bits_per_byte(point: Point, windows: Windows, weights_RD: np.ndarray) -> Bounded:
    """Of the whole held-out text, its interval from resampled documents (weights_RD)."""
    return _bits(point.observed.nats_N, windows, weights_RD)


def difference(point: Point, against: Point, windows: Windows, weights_RD: np.ndarray) -> Bounded:
    """Bits per byte of `point` minus those of `against`, paired by document."""
    return _bits(point.observed.nats_N - against.observed.nats_N, windows, weights_RD)


def rivals(point: Point, points: list[Point]) -> list[Point]:
    """What an own allocation is compared with: the same weights uniform and random, and the static model, at the same
    number asked for."""
    same = [other for other in points if other.asked == point.asked]
    return [
        other
        for other in same
        if other.allocation == TRAINED or (other.weights == point.weights and other.allocation in (UNIFORM, RANDOM))
    ]


def _bits(nats_N: np.ndarray, windows: Windows, weights_RD: np.ndarray) -> Bounded:
    n_documents, document_N = weights_RD.shape[1], windows.document_N
    bits_D = document_sums(nats_N / math.log(2), document_N, n_documents)
    return ratio(bits_D, document_sums(windows.n_bytes_N, document_N, n_documents), weights_RD)
