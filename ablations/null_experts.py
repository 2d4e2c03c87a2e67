"""Null experts: real and null columns compete for a token's slots (arXiv 2406.13233), the mean of real experts held at
the baseline's number."""

from ablations.cli import run_alone
from ablations.method import START, Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.null_experts import NullExperts


def change(model: ModelConfig) -> ModelConfig:
    k, n_experts = experts_of(model), model.moe.n_experts
    # Two thirds more slots than real experts wanted, half as many null columns as experts: 20 slots, 40 columns at
    # top-12 of 80. With at least as many columns as slots no slot is real by force, so the weights can be run at any
    # budget.
    slots = min(round(5 * k / 3), n_experts)
    return with_policy(model, NullExperts(k=slots, n_null=max(n_experts // 2, slots), target_mean=k, start=START))


METHOD = Method(
    name="null_experts",
    question=(
        "Do tokens do better when they may leave slots to experts that compute nothing, at the same mean of real ones?"
    ),
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
