"""Top-p routing: as many experts as a token needs to gather a probability mass (arXiv 2403.07652), the mean held at the
baseline's number."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.top_p import TopP


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, TopP(target_mean=k, cap=min(2 * k, model.moe.n_experts)))


METHOD = Method(
    name="top_p",
    question="Do tokens do better when each takes as many experts as its probability mass asks for, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
