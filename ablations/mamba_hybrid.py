"""Three Mamba-2 layers to one full layer."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="mamba_hybrid",
    question="Do Mamba-2 layers, with a full layer every fourth, do as well as the layers that they replace?",
    change=lambda model: with_plan(model, "DDDF"),
)


if __name__ == "__main__":
    run_alone(METHOD)
