"""ReLU routing as published (arXiv 2412.14711): an L1 penalty steers the number of positive logits towards the
baseline's number. It joins a trunk with the jump that `ablations/relu.py` explains."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.relu import ReLU


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, ReLU(target_mean=k, cap=min(2 * k, model.moe.n_experts), centred=True, control="penalty"))


METHOD = Method(
    name="relu_penalty",
    question="How near does the published penalty of ReLU routing hold the number of experts, and at what loss?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
