"""CompleteP for a mixture of experts: what every tensor's first weights, learning rate, weight decay and epsilon are
multiplied by, so that rates that were tuned on a small model fit larger ones.

The rules are one table, `TABLE`, of powers of four ratios to the sizes of the model that was tuned
(`lm.config.Parametrization`): width w of the residual stream, depth l, hidden width f of an expert, experts per token
k. At the base's own sizes all ratios are one and nothing changes.

Where the rules come from:

- Width: the maximal update parametrization (Yang 2022, arXiv 2203.03466). An input of n numbers adds up n updates of
  one sign, so the rate of a matrix falls as 1 / n. The head starts from zero here; its rate falls likewise.
- Depth: CompleteP (Dey 2025, arXiv 2505.01618) with alpha = 1. What a block adds is divided by l (`lm.block`), so L
  blocks add up to the same change as before; rates of matrices then do not depend on the depth, and an output
  projection begins as large as at the base's depth.
- Weight decay and epsilon: the product of rate and decay stays (CompleteP's Table 1), and AdamW's epsilon goes as the
  tensor's gradient.
- Experts: Complete-muE (Peng 2026, arXiv 2605.23893) takes k experts of width f as one dense layer of the active width
  k f (its first bridge; Malasnicki 2025, arXiv 2508.09752, derives the same for the width). The weights of a token's
  experts sum to one here, so the k terms of a sum are already divided by k: the rate of a down projection falls as
  1 / f, and its first weights grow as k^1/2, which keeps the size of the sum of k independent terms. The number of
  experts changes nothing at a fixed k: each expert sees a smaller batch and as many fewer tokens, and what these two
  ask of rate and decay cancels to first order (its second bridge). The exponents of this table are derived here; the
  public abstract and page of that paper state its principle, and its own table was not at hand.

What is not covered: the balance loss moves routers as fast at any depth, while what the loss says of them falls with
the depth; the norm at which gradients are clipped is the same at all sizes; duration and batch size have rules of
their own.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import torch
from torch import nn

from lm.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
    """Of one kind of tensor: products of powers of ratios, "w^-1 l^-1" say; empty for 1.

    Attributes:
        init: of the first weights, beyond what they are at this model's sizes without a parametrization: normal with
            standard deviation fan_in^-1/2, and of output projections (2 n_layers)^-1/2 of that.
        rate: of AdamW's learning rate; the weight decay has the inverse.
        eps: of AdamW's epsilon, which goes as the gradient.
        fan_in, fan_out: of the matrix; Muon's rate follows from them (`staged_training.optimizer`).
    """

    init: str = ""
    rate: str = ""
    eps: str = ""
    fan_in: str = ""
    fan_out: str = ""


TABLE = {
    "embedding": Powers(eps="w^-1", fan_out="w^1"),
    "head": Powers(rate="w^-1", fan_in="w^1"),
    # Attention's maps from the residual stream to heads, whose number grows with the width.
    "inner": Powers(rate="w^-1", eps="w^-1 l^-1", fan_in="w^1", fan_out="w^1"),
    "output": Powers(init="l^0.5", rate="w^-1", eps="w^-1 l^-1", fan_in="w^1", fan_out="w^1"),
    # Maps from a width that does not grow: a latent, a head.
    "narrow": Powers(eps="w^-1 l^-1", fan_out="w^1"),
    "router": Powers(rate="w^-1", eps="l^-1", fan_in="w^1"),
    "expert_in": Powers(rate="w^-1", eps="f^-1 k^-1 l^-1", fan_in="w^1", fan_out="f^1"),
    "expert_out": Powers(init="k^0.5 l^0.5", rate="f^-1", eps="w^-1 k^-1 l^-1", fan_in="f^1", fan_out="w^1"),
    # Of a block: norms, biases, filters of single channels, constants of heads.
    "vector": Powers(eps="w^-1 l^-1"),
    "last_norm": Powers(eps="w^-1"),
}
# Kinds of tensors by the end of their names; a name that is not here is a vector, or refused where it has two
# dimensions or more.
KIND_OF = {
    "embedding_VD": "embedding",
    "head_VD": "head",
    "to_inner.weight": "inner",
    "to_out.weight": "output",
    "to_query.weight": "narrow",
    "to_heads.weight": "narrow",
    "to_gate.weight": "narrow",
    "to_decay.weight": "narrow",
    "weight_ED": "router",
    "null_weight_ZD": "router",
    "mix_CD": "router",
    "head_D": "router",
    "shared_gate_D": "router",
    "experts.w_gate_up_EDF2": "expert_in",
    "experts.w_down_EFD": "expert_out",
    "shared_expert.w_gate_up_DF2": "inner",
    "shared_expert.w_down_FD": "output",
    "latent_in_DL": "inner",
    "latent_out_LD": "output",
    "constant_CD": "vector",
    "conv_XW": "vector",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What `TABLE` says of one tensor, as numbers.

    Attributes:
        kind: row of the table.
        init, rate, eps: factors.
        fan_in, fan_out: ratios to the base's.
    """

    kind: str
    init: float
    rate: float
    eps: float
    fan_in: float
    fan_out: float


def tensor_rules(model: nn.Module) -> dict[str, Rule]:
    """The rule of every parameter of a `LanguageModel` with a parametrization, by its name.

    Raises:
        ValueError: for a tensor of two dimensions or more that the table does not know.
    """
    config = model.config
    assert isinstance(config, ModelConfig)
    assert config.parametrization is not None
    rules = {}
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        kind = _kind(name)
        if kind is None:
            if parameter.dim() >= 2:
                raise ValueError(f"--parametrization complete_p: no rule for {name} of shape {tuple(parameter.shape)}")
            kind = "vector"
        ratios = ratios_of(config, int(block[1]) if block else 0)
        powers = dataclasses.asdict(TABLE[kind])
        rules[name] = Rule(kind=kind, **{field: _product(text, ratios) for field, text in powers.items()})
    return rules


def ratios_of(config: ModelConfig, layer: int) -> dict[str, float]:
    """w, l, f and k of a block."""
    base, moe = config.parametrization, config.block(layer).moe
    assert base is not None
    return {
        "w": config.d_model / base.base_d_model,
        "l": config.n_layers / base.base_n_layers,
        # Where there are no experts nothing has their width.
        "f": (moe.d_expert or base.base_d_expert) / base.base_d_expert,
        "k": moe.router.policy.assumed_experts / base.base_k,
    }


def scale_initial(model: nn.Module, layers: Iterable[int] | None) -> None:
    """Multiplies fresh weights by their rules' `init`.

    Args:
        layers: blocks whose weights are fresh; everything where it is None.
    """
    fresh = None if layers is None else {f"blocks.{index}." for index in layers}
    parameters = dict(model.named_parameters())
    for name, rule in tensor_rules(model).items():
        if rule.init != 1.0 and (fresh is None or name[: name.find(".", 7) + 1] in fresh):
            with torch.no_grad():
                parameters[name].mul_(rule.init)


def _kind(name: str) -> str | None:
    if name == "norm.weight":
        return "last_norm"
    return next((kind for end, kind in KIND_OF.items() if name == end or name.endswith(f".{end}")), None)


@functools.cache
def _powers(text: str) -> tuple[tuple[str, float], ...]:
    return tuple((ratio, float(power)) for ratio, _, power in (each.partition("^") for each in text.split()))


def _product(text: str, ratios: dict[str, float]) -> float:
    product = 1.0
    for ratio, power in _powers(text):
        product *= ratios[ratio] ** power
    return product
