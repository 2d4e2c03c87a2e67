"""Random-k training (Matryoshka, arXiv 2509.26520): the number of experts is drawn anew for each step, and is the
baseline's at evaluation."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.random_k import RandomK


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    # Symmetric about k, so that training costs what the baseline's does: 4 to 20 at top-12.
    reach = min(k - max(1, k // 3), model.moe.n_experts - k)
    return with_policy(model, RandomK(k_min=k - reach, k_max=k + reach, k_eval=k))


METHOD = Method(
    name="random_k",
    question="What does it cost, at the usual number of experts, to train for any number of experts?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
