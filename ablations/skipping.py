"""Skipping (arXiv 2402.14800) that training knows of: a token leaves out the experts that weigh little beside its best
one, the mean held at the baseline's number. It joins a trunk with the jump of `relative_threshold`, whose choice is the
same there."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.skipping import Skipping


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    # Slots to spare, so that tokens whose experts weigh alike may have more than the mean, and a ratio to start from
    # that skips nothing: training moves it to where the mean is k.
    return with_policy(model, Skipping(k=min(2 * k, model.moe.n_experts), ratio=0.0, target_mean=k))


METHOD = Method(
    name="skipping",
    question="Do tokens do better when they leave out experts that weigh little beside their best, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
