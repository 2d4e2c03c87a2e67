"""What llama.cpp asks of a model before a file of it computes the same: one `Architecture` for each family.

Its graphs know no options where the published models of a family have none: whether weights of experts are renormalised
is part of the architecture, and not of the file. What a model of ours must be is asked here, and refused by name.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from lm.config import ModelConfig
from moe.config import MoEConfig

Tensors = Iterator[tuple[str, Tensor]]
# What a file says beside its tensors, by the key behind the architecture's name.
Keys = Mapping[str, int | float | bool | str | Sequence[int]]
# llama.cpp's number for scores by sigmoids.
SIGMOID = 2


def _as_it_is(name: str, tensor: Tensor, model: ModelConfig) -> Tensors:
    yield name, tensor


def _nothing(model: ModelConfig) -> Keys:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's.

    Attributes:
        name: as the file has it.
        check: what of a model does not fit, as sentences; none where all does.
        pre_tokenizer: the rule by which texts are cut before merges, of a byte-level tokenizer.
        convert: from a published tensor, experts of a layer stacked, to those that the file has in its place, under
            published names.
        keys: further keys of the file, or others in place of those that all have.
        yarn: whether `keys` says how a rotary embedding is stretched.
        layers: how many layers the file has.
        without_experts: the architecture of models of the family in which no layer has experts; None where there are
            no such ones.
    """

    name: str
    check: Callable[[ModelConfig], list[str]]
    pre_tokenizer: str
    convert: Callable[[str, Tensor, ModelConfig], Tensors] = _as_it_is
    keys: Callable[[ModelConfig], Keys] = _nothing
    yarn: bool = False
    layers: Callable[[ModelConfig], int] = lambda model: model.n_layers
    without_experts: "Architecture | None" = None


def dense_layers(model: ModelConfig) -> list[int]:
    """Layers with an MLP in place of experts."""
    return [layer for layer in range(model.n_layers) if model.block(layer).moe.n_experts == 1]


def sparse_moe(model: ModelConfig) -> MoEConfig:
    """The experts of the first layer that has some."""
    return next(block.moe for block in map(model.block, range(model.n_layers)) if block.moe.n_experts > 1)


def no_dense_layers(model: ModelConfig) -> list[str]:
    dense = dense_layers(model)
    return [f"dense layers ({', '.join(map(str, dense))}); legal: experts in every layer"] if dense else []


def dense_layers_first(model: ModelConfig) -> list[str]:
    dense = dense_layers(model)
    if dense == list(range(len(dense))):
        return []
    return [f"dense layers ({', '.join(map(str, dense))}); legal: the first ones"]


def renormalised(model: ModelConfig) -> list[str]:
    if sparse_moe(model).router.renormalise:
        return []
    return ["weights of experts as they are (norm_topk_prob = false); legal: true"]


def whole_shared_expert(model: ModelConfig) -> list[str]:
    moe = sparse_moe(model)
    if moe.d_shared % moe.d_expert == 0:
        return []
    return [f"shared expert of {moe.d_shared}; legal: a multiple of {moe.d_expert}"]


def sigmoid_keys(model: ModelConfig) -> Keys:
    """Experts of DeepSeek-V3's kind: sigmoid scores, a shared expert, dense layers first."""
    moe = sparse_moe(model)
    return {
        "expert_shared_count": moe.d_shared // moe.d_expert,
        "leading_dense_block_count": len(dense_layers(model)),
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": moe.router.scaling,
        "expert_weights_norm": moe.router.renormalise,
    }


def yarn_keys(model: ModelConfig) -> Keys:
    """How the rotary embedding is stretched. llama.cpp begins and ends the ramp at a pair, whatever a model does."""
    if (yarn := model.attention.yarn) is None:
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_length,
        "rope.scaling.yarn_beta_fast": yarn.fast_turns,
        "rope.scaling.yarn_beta_slow": yarn.slow_turns,
    }
