"""The baseline once more under other branch seeds: what a comparison shows where nothing but chance differs."""

from ablations.cli import run_alone
from ablations.method import Method

METHOD = Method(
    name="other_order",
    question="How large a difference does another order of the data make?",
    change=lambda model: model,
    # Far from any seed a user counts up from, so the data order and all draws differ from the baseline's.
    seed_shift=1_000_000,
)


if __name__ == "__main__":
    run_alone(METHOD)
