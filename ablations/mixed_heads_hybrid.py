"""Softmax heads and lightning heads side by side in every layer, half of each (parallel heads as in Hymba, arXiv
2411.13676)."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="mixed_heads_hybrid",
    question="Do softmax and linear heads side by side, half of each, do as well as the layers that they replace?",
    change=lambda model: with_plan(model, "M"),
)


if __name__ == "__main__":
    run_alone(METHOD)
