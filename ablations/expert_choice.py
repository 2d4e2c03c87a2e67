"""Expert choice in training (arXiv 2202.09368): every expert takes the tokens that score highest for it, as many as the
others. Measured as a language model is used: every token takes its k best experts."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.expert_choice import ExpertChoice


def change(model: ModelConfig) -> ModelConfig:
    return with_policy(model, ExpertChoice(k=experts_of(model)))


METHOD = Method(
    name="expert_choice",
    question=(
        "Do experts become better when they choose their tokens in training, for tokens that choose their experts when"
        " the model is used?"
    ),
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
