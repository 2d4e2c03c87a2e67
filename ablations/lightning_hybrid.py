"""Three lightning (fixed-decay linear attention) layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="lightning_hybrid",
    question=(
        "Does linear attention with a fixed decay, with a full layer every fourth, do as well as what it replaces?"
    ),
    change=lambda model: with_plan(model, "LLLF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
