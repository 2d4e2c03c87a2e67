"""Sliding windows that share keys and values: of three window layers the upper two reuse those of the lowest."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="shared_window_hybrid",
    question="What does it cost to let sliding-window layers reuse the keys and values of the window layer below?",
    change=lambda model: with_plan(model, "SrrF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
