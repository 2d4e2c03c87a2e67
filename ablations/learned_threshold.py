"""Every expert learns its own bar (in the manner of DynMoE, arXiv 2405.14297), the mean held at the baseline's
number."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.threshold import LearnedThreshold


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, LearnedThreshold(target_mean=k, cap=min(2 * k, model.moe.n_experts), centred=True))


METHOD = Method(
    name="learned_threshold",
    question="Do tokens do better when each expert learns how high its bar is, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
