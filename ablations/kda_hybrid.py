"""Three Kimi delta attention layers to one full layer, the ratio of Kimi Linear (arXiv 2510.26692)."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="kda_hybrid",
    question=(
        "Does linear attention with a delta rule that decays every key channel at its own rate, with a full"
        " layer every fourth, do as well as what it replaces?"
    ),
    change=lambda model: with_plan(model, "KKKF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
