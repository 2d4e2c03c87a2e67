"""Where a comparison cuts the network, and whether the blocks above the cut keep the trunk's weights.

Below the boundary everything is the trunk's and frozen; above it each branch has its own. Only a contiguous prefix
saves compute: its outputs can be stored once, while frozen layers scattered through the network still need a backward
pass through them.
"""

import dataclasses
from collections.abc import Mapping

from lm.accounting import meta_model, model_cost
from lm.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the branches of a plan begin.

    Attributes:
        boundary: first block of the branches; 0 branches the whole network, embedding included.
        fresh: the blocks above the boundary are initialised anew in every branch.
        share: share of the parameters that is frozen.
        reasons: how this was decided, for people.
    """

    boundary: int
    fresh: bool
    share: float
    reasons: tuple[str, ...]


def choose_cut(trunk: ModelConfig, methods: Mapping[str, ModelConfig], freeze: float) -> Cut:
    """The boundary whose frozen share of all parameters is nearest to `freeze`, lowered as far as the methods need.

    A method is architectural when a block of it differs from the trunk's in letter or in the shape of any weight. One
    architectural method makes the blocks above the boundary fresh in every branch, the baseline's too, or it would
    compete untrained against trained. The boundary is lowered until the blocks above it differ from the trunk's for
    each architectural method, and until no layer above it reads keys and values of a layer below it, or adds what
    experts below it give (what is stored at the boundary holds neither).

    Raises:
        ValueError: for `freeze` outside [0, 1) or a method that differs from the trunk where branches cannot.
    """
    if not 0 <= freeze < 1:
        raise ValueError(f"freeze: {freeze}, must be the share of parameters to freeze, in [0, 1)")
    for name, config in methods.items():
        refuse_other_trunk(trunk, config, name)
    architectural = [name for name, config in methods.items() if different_blocks(trunk, config)]
    nearest = min(range(trunk.n_layers), key=lambda boundary: (abs(frozen_share(trunk, boundary) - freeze), boundary))
    share = frozen_share(trunk, nearest)
    reasons = [
        f"freezing {freeze:.0%} of the parameters: the nearest boundary is below block {nearest} of {trunk.n_layers}"
        f" ({share:.1%})"
    ]
    boundary = nearest
    # Downwards only: a lower boundary trains more than was asked, a higher one would freeze more.
    while boundary and (problem := _problem(trunk, methods, architectural, boundary)):
        boundary -= 1
        reasons.append(f"lowered to {boundary}: {problem}")
    if architectural:
        names = ", ".join(architectural)
        reasons.append(
            f"blocks from {boundary} on are fresh in every branch, because these methods change the architecture:"
            f" {names}"
        )
        if boundary == 0:
            reasons.append(
                "no block is re-used: branches take only the embedding, the last norm and the head from the trunk"
            )
    else:
        reasons.append(f"blocks from {boundary} on start from the trunk's weights in every branch")
    return Cut(
        boundary=boundary, fresh=bool(architectural), share=frozen_share(trunk, boundary), reasons=tuple(reasons)
    )


def frozen_share(config: ModelConfig, boundary: int) -> float:
    """Share of all parameters below the boundary; with boundary 0 nothing is frozen, the embedding neither."""
    # Parameters only, which depend neither on the length nor on how many experts a token uses.
    return model_cost(config, length=1, mean_experts=0).prefix_share(boundary) if boundary else 0.0


def compose(trunk: ModelConfig, method: ModelConfig, boundary: int) -> ModelConfig:
    """The method's config with the trunk's layers, experts and routers below the boundary."""
    layers = range(trunk.n_layers)
    return method.with_blocks([(trunk if layer < boundary else method).block(layer) for layer in layers])


def different_blocks(trunk: ModelConfig, method: ModelConfig) -> list[int]:
    """Blocks whose letter or any weight's shape is not the trunk's. Weights that can join a trunk do not count: see
    `added_weights`."""
    added = set(added_weights(trunk, method))
    return [
        layer
        for layer in range(trunk.n_layers)
        if trunk.plan.letters[layer] != method.plan.letters[layer]
        or _block_shapes(trunk, layer) != {n: s for n, s in _block_shapes(method, layer).items() if n not in added}
    ]


def added_weights(trunk: ModelConfig, method: ModelConfig) -> list[str]:
    """Weights that the trunk does not have and that may join it, initialised as in a model of the method's own: those
    of routers (null columns, say), and sinks of attention heads, which one logit of zero beside those of all keys
    hardly changes."""
    known, model = dict(meta_model(trunk).named_parameters()), meta_model(method)
    routers = model.names_in(model.routers())
    return [
        name
        for name, _ in model.named_parameters()
        if name not in known and (name in routers or name.endswith(".sink_H"))
    ]


def _block_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    model = meta_model(config)
    names = model.names_in([model.blocks[index]])
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in names}


def refuse_other_trunk(trunk: ModelConfig, method: ModelConfig, name: str) -> None:
    """A branch may change the layer plan, attention and experts; everything else is shared with the frozen part.

    Raises:
        ValueError: naming the method and each field that differs.
    """
    wrong = [
        f"{field.name} is {getattr(method, field.name)!r} instead of {getattr(trunk, field.name)!r}"
        for field in dataclasses.fields(trunk)
        if field.name not in ("layer_plan", "attention", "moe", "blocks")
        and getattr(method, field.name) != getattr(trunk, field.name)
    ]
    if wrong:
        raise ValueError(
            f"method {name!r} cannot branch from this trunk: {'; '.join(wrong)}; a branch may change layer_plan,"
            " attention and moe only"
        )


def _problem(
    trunk: ModelConfig, methods: Mapping[str, ModelConfig], architectural: list[str], boundary: int
) -> str | None:
    for name, config in methods.items():
        composed = compose(trunk, config, boundary)
        if composed.block(boundary - 1).shortcut:
            return f"block {boundary - 1} adds what its experts give behind block {boundary}"
        for layer in range(boundary, trunk.n_layers):
            if composed.plan.source[layer] < boundary:
                return (
                    f"layer {layer} ({composed.plan.letters[layer]}) of {name} reads keys and values of layer"
                    f" {composed.plan.source[layer]}"
                )
        if name in architectural and not any(layer >= boundary for layer in different_blocks(trunk, config)):
            return f"the blocks of {name} above it are the trunk's own"
    return None
