"""Zero-computation experts (LongCat-Flash, arXiv 2509.01322): slots may go to columns that return the token itself, the
mean of real experts held at the baseline's number."""

from ablations.cli import run_alone
from ablations.method import START, Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.zero_computation import ZeroComputationExperts


def change(model: ModelConfig) -> ModelConfig:
    k, n_experts = experts_of(model), model.moe.n_experts
    # As many slots and columns as `null_experts` has, so that the two differ in what a column returns, and in that a
    # token may be left without real experts here.
    slots = min(round(5 * k / 3), n_experts)
    return with_policy(
        model, ZeroComputationExperts(k=slots, n_null=max(n_experts // 2, slots), target_mean=k, start=START)
    )


METHOD = Method(
    name="zero_computation",
    question=(
        "Do tokens do better when they may leave slots to experts that return the token itself, at the same mean of"
        " real ones?"
    ),
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
