"""Layers take turns in using more and fewer experts than the baseline's layers, at the same mean over two of them.

What numbers a trained model should have, `python -m lm layer-experts` finds (arXiv 2509.02753)."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.layer_top_k import LayerTopK


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    more = min(k // 3, model.moe.n_experts - k)
    return with_policy(model, LayerTopK(layers=(k + more, k - more)))


METHOD = Method(
    name="layer_top_k",
    question="Does it matter which layers have the experts, when one has a third more and the next a third fewer?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
