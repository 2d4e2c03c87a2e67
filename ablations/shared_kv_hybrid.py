"""Yi-Lightning's block (arXiv 2412.01253): sliding windows, and a full layer that reuses the keys and values of the one
below."""

from ablations.cli import run_alone
from ablations.method import Method, with_plan

METHOD = Method(
    name="shared_kv_hybrid",
    question=(
        "What does it cost to let every second full layer of a sliding-window hybrid reuse the keys and values of the"
        " one below?"
    ),
    change=lambda model: with_plan(model, "SSSFSSSR"),
)


if __name__ == "__main__":
    run_alone(METHOD)
