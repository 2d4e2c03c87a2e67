"""A control that is known to be better: branches of twice the tokens."""

from ablations.cli import run_alone
from ablations.method import Method

METHOD = Method(
    name="more_tokens",
    question="Does this run see that training on twice as many tokens above the trunk is better?",
    change=lambda model: model,
    length=2,
    known="better",
)


if __name__ == "__main__":
    run_alone(METHOD)
