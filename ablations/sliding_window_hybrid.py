"""Three sliding-window layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="sliding_window_hybrid",
    question=(
        "Does full attention in one layer of four, and a sliding window in the others, do as well as full attention"
        " everywhere?"
    ),
    change=lambda model: with_plan(model, "SSSF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
