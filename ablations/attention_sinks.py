"""A learnt logit per head in the softmax's denominator (gpt-oss, arXiv 2508.10925): a head may attend to nothing."""

import dataclasses

from ablations.cli import run_alone
from ablations.method import Method
from lm.config import ModelConfig


def change(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, sink_logits=True))


METHOD = Method(
    name="attention_sinks",
    question="Do heads do better that may attend to nothing?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
