"""Each expert computes the tokens that pass a bar of its own, a moving average that keeps loads even without a balance
loss (arXiv 2603.11535), the mean number of experts that of the baseline."""

import dataclasses

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.expert_threshold import ExpertThreshold


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    changed = with_policy(model, ExpertThreshold(k=k, cap=min(2 * k, model.moe.n_experts)))
    # The bars balance: neither the loss nor a selection bias has anything left to do.
    router = dataclasses.replace(changed.moe.router, balance_coefficient=0.0, selection_bias_step=0.0)
    return dataclasses.replace(changed, moe=dataclasses.replace(changed.moe, router=router))


METHOD = Method(
    name="expert_threshold",
    question="Do tokens do better when each expert takes those above a bar of its own, without a balance loss?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
