"""Sliding windows of four times as many tokens, with the trunk's weights."""

import dataclasses

from ablations.cli import run_alone
from ablations.method import Method
from lm.config import ModelConfig


def change(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, window=4 * model.attention.window))


METHOD = Method(
    name="wider_window",
    question="Do sliding-window layers do better where they see four times as many tokens?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
