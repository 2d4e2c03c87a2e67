"""A control that is known to be worse: a sixth of the experts for every token, 2 at top-12, which carry the whole
weight."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.top_k import TopK


def change(model: ModelConfig) -> ModelConfig:
    return with_policy(model, TopK(k=max(1, experts_of(model) // 6)))


METHOD = Method(
    name="fewer_experts",
    question="Does this run see that a sixth of the experts per token is worse?",
    change=change,
    known="worse",
)


if __name__ == "__main__":
    run_alone(METHOD)
