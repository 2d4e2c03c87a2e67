"""Three gated DeltaNet layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="gated_delta_hybrid",
    question=(
        "Does linear attention with the gated delta rule in three layers of four do as well as full attention"
        " everywhere?"
    ),
    change=lambda model: with_plan(model, "GGGF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
