"""Multi-head latent attention in every layer (DeepSeek-V2, arXiv 2405.04434), its latent in DeepSeek's proportion to a
head: four times as wide, and half a head of shared key channels."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="latent_attention",
    question=(
        "Does attention on one cached latent per token, from which the keys and values of all heads are made, do as"
        " well as the baseline's attention?"
    ),
    change=lambda model: with_plan(model, "A"),
)


if __name__ == "__main__":
    run_alone(METHOD)
