"""The arms of the study: registered methods, and a few that are here only because their quality is spread widely."""

import dataclasses

from ablations.comparison.registry import BASELINE, all_methods
from ablations.method import Method, with_plan, with_policy
from foundation.serialize import nearest
from lm.config import ModelConfig
from routing.policies.top_k import TopK


def static(k: int) -> Method:
    """Another number of experts for every token; that of the baseline is 12 unless told otherwise."""
    return Method(
        name=f"static_{k}",
        question=f"How well does a model do with {k} experts for every token?",
        change=lambda model: with_policy(model, TopK(k=k)),
    )


def sigmoid_bias(model: ModelConfig) -> ModelConfig:
    """Scores by sigmoid, balanced by a selection bias instead of a loss (arXiv 2412.19437)."""
    router = dataclasses.replace(model.moe.router, score="sigmoid", balance_coefficient=0.0, selection_bias_step=1e-3)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, router=router))


OWN = {
    method.name: method
    for method in (
        *(static(k) for k in (2, 4, 8, 24)),
        Method(
            name="full_attention",
            question="Does full attention in every layer do better?",
            change=lambda model: with_plan(model, "F"),
        ),
        Method(
            name="sigmoid_bias",
            question="Does a sigmoid with a selection bias do as well as a softmax balanced by a loss?",
            change=sigmoid_bias,
        ),
    )
}

ROUTING = ("static_2", "static_4", "static_8", "static_24", "top_p", "null_experts", "relu", "sigmoid_bias")
ARCHITECTURE = ("full_attention", "lightning_hybrid", "gated_delta_hybrid", "kda_hybrid", "mixed_heads_hybrid")


def find_arms(names: tuple[str, ...], baseline: ModelConfig) -> list[Method]:
    """The named arms, the baseline put first.

    Args:
        names: of arms of this study and of registered methods; duplicates count once.

    Raises:
        ValueError: for an unknown name, with the nearest legal one, for an arm that is the baseline once more, and for
            fewer than two arms beside the baseline.
    """
    known = {**all_methods(), **OWN}
    arms = []
    for name in dict.fromkeys([BASELINE, *names]):
        if name not in known:
            raise ValueError(f"--arms: no arm {name!r}; {nearest(name, known)}")
        method = known[name]
        if name != BASELINE and method.kind(baseline) not in ("architecture", "attention", "routing"):
            raise ValueError(f"--arms: {name!r} is the baseline's own model, whose true difference is zero")
        arms.append(method)
    if len(arms) < 3:
        raise ValueError(f"--arms: {', '.join(names)}, an order needs at least two arms beside the baseline")
    return arms
