"""Difficulty head: a linear head predicts how many experts pay off for a token, the mean held at the baseline's
number."""

from ablations.cli import run_alone
from ablations.method import START, Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.difficulty_head import DifficultyHead


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, DifficultyHead(target_mean=k, cap=min(2 * k, model.moe.n_experts), start=START))


METHOD = Method(
    name="difficulty_head",
    question="Do tokens do better when a head of its own predicts how many experts each needs, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
