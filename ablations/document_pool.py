"""The tokens of a document choose their experts from a pool of half of them (arXiv 2605.06663, causal): less memory for
a document, as many experts for a token."""

from ablations.cli import run_alone
from ablations.method import Method, experts_of, with_policy
from lm.config import ModelConfig
from routing.policies.document_pool import DocumentPool


def change(model: ModelConfig) -> ModelConfig:
    k = experts_of(model)
    return with_policy(model, DocumentPool(k=k, pool=max(k, model.moe.n_experts // 2)))


METHOD = Method(
    name="document_pool",
    question="What does it cost when a document's tokens choose from half of the experts, by what came before?",
    change=change,
)


if __name__ == "__main__":
    run_alone(METHOD)
