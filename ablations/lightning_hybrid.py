"""Three lightning (fixed-decay linear attention) layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="lightning_hybrid",
    question=(
        "Does linear attention with a fixed decay in three layers of four do as well as full attention everywhere?"
    ),
    change=lambda model: with_plan(model, "LLLF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
