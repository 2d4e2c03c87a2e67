"""Multi-head latent attention in every layer (DeepSeek-V2, arXiv 2405.04434), its latent as wide as the baseline's
keys: a token costs those and half a head of shared key channels, instead of keys and values."""

import dataclasses

from ablations.cli import run_alone
from ablations.method import Method, with_plan
from lm.config import ModelConfig


def change(model: ModelConfig) -> ModelConfig:
    attention = dataclasses.replace(model.attention, latent_dim=model.attention.n_kv_heads * model.attention.head_dim)
    return with_plan(dataclasses.replace(model, attention=attention), "A")


METHOD = Method(
    name="latent_attention",
    question=(
        "Does attention on one cached latent per token, from which the keys and values of all heads are made,"
        " do as well as keys and values of its own?"
    ),
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
