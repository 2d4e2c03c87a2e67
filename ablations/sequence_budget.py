"""Each token uses the experts whose scores rank high among those of its text so far (arXiv 2511.06494, causal), the
mean number of experts that of the baseline."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.sequence_budget import SequenceBudget


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, SequenceBudget(target_mean=k, cap=min(2 * k, model.moe.n_experts)))


METHOD = Method(
    name="sequence_budget",
    question="Do tokens do better when a text shares its experts out by how its scores rank, at the same mean?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
