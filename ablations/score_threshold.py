"""One threshold on the probability for all tokens, moved so that the mean number of experts is the baseline's."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.threshold import ScoreThreshold


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, ScoreThreshold(target_mean=k, cap=min(2 * k, model.moe.n_experts)))


METHOD = Method(
    name="score_threshold",
    question="Do tokens do better when each uses all experts above one probability, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
