"""The reference: static top-k routing and the trunk's own layer plan, trained on by itself."""

from ablations.cli import run_alone
from ablations.method import Method

METHOD = Method(
    name="baseline",
    question="How well does the trunk do when it simply trains on, with the same number of experts for every token?",
    change=lambda model: model,
)


if __name__ == "__main__":
    run_alone(METHOD)
