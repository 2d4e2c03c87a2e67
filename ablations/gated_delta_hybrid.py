"""Three gated DeltaNet layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="gated_delta_hybrid",
    question=(
        "Does linear attention with the gated delta rule, with a full layer every fourth, do as well as what"
        " it replaces?"
    ),
    change=lambda model: with_plan(model, "GGGF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
