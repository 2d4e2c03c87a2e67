"""Each token uses the experts that score at least a share of its best one's, the share moved so that the mean number of
experts is the baseline's."""

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
