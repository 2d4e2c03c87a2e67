"""Each token uses the experts that score at least a share of its best one's, the share moved so that the mean number of
experts is the baseline's.

It cannot join a trunk without a jump: tokens with one strong expert keep few, and a trunk of top-k has relied
on the rest of them; 0.006 nats on a small trunk, five times what top-p's choice costs there."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.relative_threshold import RelativeThreshold


def change(model: ModelConfig) -> ModelConfig:
    k, n_experts = experts_of(model), model.moe.n_experts
    # A floor of one, or the report could not run the weights at small budgets.
    return with_policy(model, RelativeThreshold(target_mean=k, floor=1, cap=min(2 * k, n_experts)))


METHOD = Method(
    name="relative_threshold",
    question="Do tokens do better when each uses the experts near its best one, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
