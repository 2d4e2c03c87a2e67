"""ReLU routing (arXiv 2412.14711), the mean number of positive logits held at the baseline's number by a shift common
to all.

The positive part of a logit weighs experts otherwise than the softmax that trained the trunk, so a branch begins 0.005
nats away from it (`tests/ablations/test_fork_shock.py`), and a smaller difference is withheld."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.relu import ReLU


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, ReLU(target_mean=k, cap=min(2 * k, model.moe.n_experts), centred=True))


METHOD = Method(
    name="relu",
    question="Do tokens do better when every expert with a positive logit is used, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
