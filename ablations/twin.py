"""The baseline once more, in the same order, from weights that differ by rounding: what a pair shows where nothing but
rounding differs."""

from ablations.cli import run_alone
from ablations.method import Method

METHOD = Method(
    name="twin",
    question="How large a difference does rounding alone make?",
    change=lambda model: model,
    rounding=True,
)


if __name__ == "__main__":
    run_alone(METHOD)
