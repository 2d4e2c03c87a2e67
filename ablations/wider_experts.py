"""A control that is known to be better: experts of four times the width. No trunk has their weights, so every arm of
the comparison starts with fresh blocks above the boundary."""

import dataclasses

from ablations.cli import run_alone
from ablations.method import Method
from lm.config import ModelConfig


def change(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, d_expert=4 * model.moe.d_expert))


METHOD = Method(
    name="wider_experts",
    question="Does this run see that experts of four times the width are better?",
    change=change,
    known="better",
)


if __name__ == "__main__":
    run_alone(METHOD)
