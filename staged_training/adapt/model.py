"""A trained model of a fixed number of experts as the start of one whose number varies.

All weights are taken over, and a policy may bring its own: null columns, a difficulty head. Columns that join trained
ones would change what these compute, so nothing is to be seen of them at the start: the policy begins at a budget of
all k experts that the original used, where it chooses just those and weighs them alike, and null columns stand apart
from the softmax of the real ones. The budget then falls step by step to what was asked for (`teaching.Phases`).
The two exceptions: `difficulty`, whose last experts weigh less from the start, and `random_k`, which has no budget.

Legend: E experts, Z null columns.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import torch

from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.policies.difficulty_head import DifficultyHead
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.threshold import ScoreThreshold
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policy import PolicyConfig
from staged_training.checkpoint import model_tensors

AdaptMethod = Literal["zero_experts", "random_k", "top_p", "threshold", "difficulty"]
ADAPT_METHODS: tuple[AdaptMethod, ...] = get_args(AdaptMethod)


def _random_k(k: int, mean: float) -> PolicyConfig:
    if mean != int(mean):
        raise ValueError(f"--mean {mean}: random_k needs a whole number, the experts of every token outside training")
    # Symmetric about the mean where that fits, and up to what the original used.
    return RandomK(k_min=max(1, 2 * int(mean) - k), k_max=k, k_eval=int(mean))


POLICIES: dict[AdaptMethod, Callable[[int, float], PolicyConfig]] = {
    # With a null column for every slot no slot is real by force, so that any budget can be set later.
    "zero_experts": lambda k, mean: NullExperts(k=k, n_null=k, target_mean=mean, floor=min(1, int(mean)), apart=True),
    "random_k": _random_k,
    "top_p": lambda k, mean: TopP(target_mean=mean, cap=k),
    "threshold": lambda k, mean: ScoreThreshold(target_mean=mean, cap=k),
    "difficulty": lambda k, mean: DifficultyHead(target_mean=mean, cap=k),
}


def experts_of(config: ModelConfig) -> int:
    """The number of experts that every token gets in every block that has a choice.

    Raises:
        ValueError: where there is no such number, naming the blocks.
    """
    found: dict[int, list[int]] = {}
    for layer in range(config.n_layers):
        moe = config.block(layer).moe
        if moe.n_experts == 1:
            continue
        policy = moe.router.policy
        evaluated = None if policy.varies_by_token else policy.evaluated_experts
        if evaluated is None or evaluated != int(evaluated):
            raise ValueError(
                f"block {layer} is routed by {policy!r}: its number of experts varies already; legal: a fixed one"
            )
        if isinstance(policy, TopK) and policy.top_groups < policy.n_groups:
            raise ValueError(
                f"block {layer} chooses {policy.top_groups} of {policy.n_groups} groups of experts, which no policy"
                " with a variable number does: the model would not begin as it is"
            )
        found.setdefault(int(evaluated), []).append(layer)
    if len(found) != 1:
        shown = "; ".join(f"{k} in blocks {layers}" for k, layers in sorted(found.items()))
        raise ValueError(f"blocks must use the same number of experts to share one budget: {shown or 'none uses any'}")
    (k,) = found
    return k


def adapted_config(config: ModelConfig, method: AdaptMethod, mean: float) -> ModelConfig:
    """The model under a policy of `method` in every block that chooses experts.

    Raises:
        ValueError: for a mean that is out of reach, or see `experts_of`.
    """
    k = experts_of(config)
    if not 0 < mean <= k:
        raise ValueError(f"--mean {mean:g}: must lie above 0 and be at most {k}, the original's number of experts")
    policy = POLICIES[method](k, mean)
    blocks = [config.block(layer) for layer in range(config.n_layers)]
    blocks = [dataclasses.replace(block, moe=_routed_by(policy, block.moe)) for block in blocks]
    return dataclasses.replace(config, moe=_routed_by(policy, config.moe), blocks=()).with_blocks(blocks)


def _routed_by(policy: PolicyConfig, moe: MoEConfig) -> MoEConfig:
    """The layer under a policy; a single expert, a dense MLP, chooses nothing."""
    if moe.n_experts == 1:
        return moe
    return dataclasses.replace(moe, router=dataclasses.replace(moe.router, policy=policy))


@torch.no_grad()
def adapted_model(original: LanguageModel, config: ModelConfig) -> LanguageModel:
    """A model of `config` with all weights of the original; what it has beside them begins as its policy has it, and
    null columns begin at logit zero."""
    model = LanguageModel(config).to(original.embedding_VD.device)
    theirs = model_tensors(original)
    own_start = model.names_in(router.policy for router in model.routers())
    own_start |= {name for name in model_tensors(model) if name.endswith("router.null_weight_ZD")}
    for name, tensor in model_tensors(model).items():
        if name not in own_start:
            tensor.copy_(theirs[name])
    return model


def trained_names(model: LanguageModel, what: str) -> frozenset[str]:
    """Names of the parameters that "routers", "experts" (with their routers) or "everything" stands for. A router's
    policy and null columns are parts of it."""
    parameters = frozenset(name for name, _ in model.named_parameters())
    if what == "everything":
        return parameters
    if what == "routers":
        return parameters & model.names_in(model.routers())
    assert what == "experts", what
    return parameters & model.names_in(block.get_submodule("moe") for block in model.blocks)
