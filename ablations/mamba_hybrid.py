"""Three Mamba-2 layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="mamba_hybrid",
    question="Do Mamba-2 layers in three layers of four do as well as full attention everywhere?",
    change=lambda model: with_plan(model, "DDDF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
