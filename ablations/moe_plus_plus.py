"""Zero, copy and constant experts (MoE++, arXiv 2410.07348): slots may go to columns that add nothing, the token or a
vector, the mean number of real experts held at the baseline's."""

from ablations.cli import run_alone
from ablations.method import START, Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.moe_plus_plus import MoEPlusPlus


def change(model: ModelConfig) -> ModelConfig:
    k, n_experts = experts_of(model), model.moe.n_experts
    # As many slots and columns as `null_experts` has, a third of them of each kind.
    slots = min(round(5 * k / 3), n_experts)
    n_null = max(n_experts // 2, slots)
    policy = MoEPlusPlus(k=slots, n_null=n_null, n_copy=n_null // 3, n_constant=n_null // 3, target_mean=k, start=START)
    return with_policy(model, policy)


METHOD = Method(
    name="moe_plus_plus",
    question="Do tokens do better when slots may also go to columns that add nothing, the token or a vector?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
