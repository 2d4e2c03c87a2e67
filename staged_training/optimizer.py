"""The optimizer of what a stage trains, AdamW or Muon beside AdamW, and gradient clipping."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from torch import Tensor, nn

from foundation.numbers import check_numbers
from foundation.serialize import nearest
from lm.model import LanguageModel
from lm.parametrization import Rule, tensor_rules
from staged_training.muon import SCALES, Muon, Scale, update_scale
from staged_training.packed_matrices import Packing, packed_matrices

Kind = Literal["adamw", "muon"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What the optimizers keep of a parameter.
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon for the matrices inside the blocks and AdamW for everything else.

    Attributes:
        kind: "adamw" for all parameters, or "muon" for attention's and experts' matrices (staged_training/muon.py).
        muon_momentum: share that the momentum keeps per step.
        muon_scale: of a matrix's update: "match_rms_adamw" makes it as large as AdamW's, so that one learning rate
            and weight decay fit both (arXiv 2502.16982); "original" is sqrt(max(1, out / in)).
        muon_routers: Muon for the routers' matrices too.
        betas: AdamW's decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: for matrices. Vectors (norms, biases, per-head constants) have none, and neither has the
            embedding: a row that does not occur in a batch gets no gradient, and decay would shrink rare tokens towards
            zero. An embedding that is the head too gets one from every token's logits: it is a matrix like the others,
            of AdamW.
        embedding_rate: multiplies the embedding's learning rate. A row moves only when its token occurs, so the rate of
            the matrices is far too low for it: at 300k tokens ten times as much is worth 0.09 bits per byte
            (notes/LOG.md). Without effect where it is the head too.
        clip: largest norm of the whole gradient.

    Raises:
        ValueError: for a number outside its range.
    """

    kind: Annotated[Kind, tyro.conf.arg(name="optimizer", prefix_name=False)] = "muon"
    muon_momentum: float = 0.95
    muon_scale: Scale = "match_rms_adamw"
    muon_routers: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_rate: float = 70.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, legal in (("kind", KINDS), ("muon_scale", SCALES)):
            if (value := getattr(self, name)) not in legal:
                raise ValueError(f"OptimizerConfig.{name}: {value!r} is not known; {nearest(value, legal)}")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"OptimizerConfig.muon_momentum: {self.muon_momentum}, must be 0 or more and below 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"OptimizerConfig.betas: {self.betas}, must be two numbers in [0, 1)")
        positive = {name: getattr(self, name) > 0 for name in ("eps", "embedding_rate", "clip")}
        for name, legal in (positive | {"weight_decay": self.weight_decay >= 0}).items():
            if not legal:
                raise ValueError(f"OptimizerConfig.{name}: {getattr(self, name)} is too small")


def trained_parameters(model: LanguageModel, boundary: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters above the boundary: blocks [boundary, L), norm and head; with boundary 0 the embedding
    too."""
    frozen = model.frozen_names(boundary)
    for name, parameter in model.named_parameters():
        if name not in frozen:
            yield name, parameter


def build_optimizer(model: LanguageModel, config: OptimizerConfig, boundary: int) -> torch.optim.AdamW:
    """The optimizer of the trained parameters; the others stop requiring gradients. The learning rate is set before
    every step."""
    # Without this, backward would compute the gradients of frozen weights that no one reads.
    model.requires_grad_(False)
    embedding, decayed, plain = [], [], []
    for _, parameter in trained_parameters(model, boundary):
        parameter.requires_grad_(True)
        alone = parameter is model.embedding_VD and not model.config.tied_embeddings
        own = embedding if alone else decayed if parameter.dim() >= 2 else plain
        own.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
        {"params": embedding, "weight_decay": 0.0, "rate": config.embedding_rate},
    ]
    groups = [group for group in groups if group["params"]]
    packings = packed_matrices(model, routers=config.muon_routers) if config.kind == "muon" else {}
    if model.config.parametrization is not None:
        groups = _parametrized(groups, model, config, packings)
    # One kernel over all elements of a parameter, each by itself: nothing in it depends on what ran before.
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
    return Muon(
        groups,
        {parameter: packings[name] for name, parameter in trained_parameters(model, boundary) if name in packings},
        momentum=config.muon_momentum,
        scale=config.muon_scale,
        # What the model's own products are computed in is what this machine multiplies fast.
        dtype=getattr(torch, model.config.dtype),
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def _parametrized(
    groups: list[dict[str, Any]], model: LanguageModel, config: OptimizerConfig, packings: dict[str, Packing]
) -> list[dict[str, Any]]:
    """The groups, cut into those of one rate, decay and epsilon by the rules of `lm.parametrization`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rules = tensor_rules(model)
    found: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            rule = rules[name]
            factor = muon_rate(rule, packings[name], parameter, config.muon_scale) if name in packings else rule.rate
            # The product of rate and decay is that of the base.
            key = (group["rate"] * factor, group["weight_decay"] / factor, config.eps * rule.eps)
            found.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate": rate, "eps": eps}
        for (rate, decay, eps), parameters in found.items()
    ]


def muon_rate(rule: Rule, packing: Packing, parameter: Tensor, scale: Scale) -> float:
    """The factor of Muon's learning rate: its update then has a spectral norm that goes as (fan_out / fan_in)^1/2,
    which changes what the layer computes as much at any width (Yang 2023, arXiv 2310.17813).

    "original" has that norm for matrices that grow alike on both sides, and the factor is one; "match_rms_adamw" grows
    with the root of the longer side, and the factor takes that back. That depth needs no factor beside the division of
    what blocks add is CompleteP's argument for AdamW; for Muon it is assumed, as no proof is known to us.
    """
    matrices = packing.split(parameter)[0]
    sides = [matrices.shape[1], matrices.shape[2]]
    out = packing.out_dim
    base = list(sides)
    base[out] = max(1, round(sides[out] / rule.fan_out))
    base[-3 - out] = max(1, round(sides[-3 - out] / rule.fan_in))
    at_base = update_scale(torch.empty(1, *base, device="meta"), out, scale)
    return math.sqrt(rule.fan_out / rule.fan_in) * at_base / update_scale(matrices, out, scale)


def update(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    """One step at `learning_rate`, times the group's own `rate`, then forgets the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clip_gradients(optimizer: torch.optim.AdamW, limit: float) -> Tensor:
    """Scales the gradient to a norm of at most `limit`; returns the norm it had, fp32 scalar.

    Of parameters spread over processes it is the norm of the whole, the same on every process.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A DTensor is told by its mesh: importing the class costs a second, which one process does not need to spend.
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    if set(by_mesh) <= {None}:
        return nn.utils.clip_grad_norm_(parameters, limit)
    # torch adds up norms of one mesh only: expert weights lie on another than the rest.
    norms: list[Any] = [
        nn.utils.get_total_norm([parameter.grad for parameter in part if parameter.grad is not None])
        for part in by_mesh.values()
    ]
    norm = torch.stack([each.full_tensor() for each in norms]).norm()
    for part in by_mesh.values():
        nn.utils.clip_grads_with_norm_(part, limit, norm)
    return norm


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.AdamW, boundary: int) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (`exp_avg:blocks.0...`), as a checkpoint stores it."""
    states = ((name, optimizer.state.get(parameter, {})) for name, parameter in trained_parameters(model, boundary))
    return {f"{key}:{name}": value for name, state in states for key, value in state.items()}


def restore_optimizer(
    model: LanguageModel, optimizer: torch.optim.AdamW, boundary: int, tensors: dict[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` returned.

    Raises:
        ValueError: naming the first state that belongs to no trained parameter, to another optimizer, or has another
            shape.
    """
    parameters = dict(trained_parameters(model, boundary))
    matrices = optimizer.packing_of if isinstance(optimizer, Muon) else {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(":")
        parameter = parameters.get(name)
        if parameter is None or (key != "step" and tensor.shape != parameter.shape):
            raise ValueError(
                f"optimizer state {full_name!r} of shape {tuple(tensor.shape)} fits no trained parameter of this model"
            )
        if (key == "momentum_buffer") != (parameter in matrices):
            raise ValueError(f"optimizer state {full_name!r} was left by another optimizer than this")
        own = tensor.to(parameter.device)
        if key != "step" and hasattr(parameter, "device_mesh"):
            # Importing what cuts it costs a second, which one process does not need to spend.
            from staged_training.shards import cut_as

            own = cut_as(own, parameter)
        # A clone: the update works in place, and the tensors belong to whoever loaded them.
        optimizer.state[parameter][key] = own.clone()
