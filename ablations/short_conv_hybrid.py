"""Gated short convolutions with a full layer behind every two, about the ratio of LFM2 (arXiv 2511.23404)."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="short_conv_hybrid",
    question=(
        "Do convolutions over a few tokens, with a full layer every third, do as well as the layers that they replace?"
    ),
    change=lambda model: with_plan(model, "CCF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
