"""Three sliding-window layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="sliding_window_hybrid",
    question="Do sliding windows, with a full layer every fourth, do as well as the layers that they replace?",
    change=lambda model: with_plan(model, "SSSF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
