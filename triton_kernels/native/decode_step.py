"""`decode_step.c` seen from Python: the structs that describe a model to it, and a watch over what they point at.

Whoever owns weights or states describes them (`describe`) by filling in the fields of its block; what one call cannot
compute raises `NotInOneCall`.

Legend: B sequences, D model width.
"""

import ctypes
from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from triton_kernels.native.kept_weights import kept_panels
from triton_kernels.native.library import FLOAT, LONG, P

SOFTMAX, DELTA, LIGHTNING = range(3)
# Rules of a decision behind those that kernels know (`triton_kernels.experts.expert_slots.RULES`).
RIVALS, PREDICTED = 3, 4
# Asks a router outside of the call, by the number of its block; not 0 where it could not decide.
DECIDE = ctypes.CFUNCTYPE(LONG, LONG)
FACTS = (Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype"))
VERSION = attrgetter("_version")
# What `NativeModel.seconds` counts, fp64, in this order; sums of the residual stream with what they stand beside.
PARTS = ("projections", "mixing", "router", "experts", "norms", "head")
WEIGHTS, ACTIVATIONS = (torch.float32,), (torch.float32, torch.bfloat16)


class NotInOneCall(Exception):
    """A model, a cache or a setting that the call for a whole step does not know."""


class NativeWeight(ctypes.Structure):
    """`Weight` of kept_weights.c, field by field."""

    _fields_ = [(name, P) for name in ("wide", "panels")]


class NativeMatrices(ctypes.Structure):
    """`Matrices` of packed.c, field by field."""

    _fields_ = [*((name, P) for name in ("codes", "scale", "offset")), ("bits", LONG), ("group", LONG), ("panels", P)]


class NativeDecision(ctypes.Structure):
    """`Decision` of decode_step.c, field by field."""

    _fields_ = [
        *((name, P) for name in ("token", "expert_offsets", "token_offsets", "row_of_slot")),
        *((name, P) for name in ("weight", "returned", "added")),
        ("rows", LONG),
    ]


class NativeBlock(ctypes.Structure):
    """`Block` of decode_step.c, field by field."""

    _fields_ = [
        *((f"{place}_norm", P) for place in ("attention", "attention_out", "moe", "moe_out")),
        *((name, LONG) for name in ("mixer", "heads", "key", "value", "inner")),
        *((name, NativeWeight) for name in ("to_inner", "to_out")),
        ("eps", FLOAT),
        *((name, LONG) for name in ("kv_heads", "half", "output_gate", "writes", "capacity", "cache_stride", "bf16")),
        ("rope_base", ctypes.c_double),
        *((name, P) for name in ("q_norm", "k_norm", "sink", "keys", "values", "cosine", "sine")),
        *((name, NativeWeight) for name in ("to_gate", "to_decay")),
        *((name, P) for name in ("conv", "A_log", "dt_bias", "norm", "log_decay")),
        *((name, P) for name in ("state", "tail")),
        *((name, LONG) for name in ("taps", "per_channel", "use_silu")),
        *((name, P) for name in ("router", "bias", "threshold", "drift", "aim")),
        *((name, P) for name in ("null_router", "column_bias", "gain", "head")),
        *((name, LONG) for name in ("experts", "slots", "floor", "rule", "use_sigmoid", "renormalise")),
        *((name, LONG) for name in ("columns", "apart", "null_weighs", "returns")),
        ("softness", FLOAT),
        *((name, LONG) for name in ("outside", "alone")),
        ("decision", NativeDecision),
        *((name, NativeMatrices) for name in ("gate_up", "down")),
        *((name, NativeWeight) for name in ("shared_gate_up", "shared_down")),
        *((name, LONG) for name in ("d_expert", "d_shared", "whole_at", "real_at")),
    ]


class NativeModel(ctypes.Structure):
    """`Model` of decode_step.c, field by field."""

    _fields_ = [
        ("block", ctypes.POINTER(NativeBlock)),
        *((name, P) for name in ("embedding", "norm")),
        ("head", NativeWeight),
        *((name, LONG) for name in ("blocks", "vocabulary", "width", "batch", "bf16")),
        ("eps", FLOAT),
        ("seconds", P),
        ("decide", DECIDE),
    ]


class Watch:
    """What a described model stands on. Addresses outlive what lay there: `holds` is asked before every use of them.

    Attributes:
        batch_size, d_model: the B and D above.
        keeps: whether copies of the weights are kept, see `kept_weights`.
    """

    def __init__(self, batch_size: int, d_model: int, *, keeps: bool = False) -> None:
        self.batch_size, self.d_model, self.keeps = batch_size, d_model, keeps
        # Owner by owner, what its name must still stand for.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._empty: list[dict[Any, Any]] = []
        self._asked: list[tuple[Callable[[], object], object]] = []
        self._tensors: list[Tensor] = []
        # Weights and their copies, which would not see a weight change.
        self._copied: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._lay: tuple[list[object], ...] = ()

    def module(self, module: nn.Module) -> None:
        """It stays what it is, in evaluation mode, with the parts that it has, and nobody listens to its calls."""
        if module.training or "forward" in module.__dict__:
            raise NotInOneCall(f"{type(module).__name__} is training, or its forward was replaced")
        self.same(module, "training", "forward")
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                raise NotInOneCall(f"{type(module).__name__} has hooks")
            self._empty.append(hooks)
        for name, child in module._modules.items():
            self._is(module._modules, name, child)

    def same(self, owner: object, *names: str) -> None:
        """These attributes of `owner` itself stay what they are, or missing."""
        for name in names:
            self._is(owner.__dict__, name, owner.__dict__.get(name))

    def answers(self, ask: Callable[[], object]) -> None:
        """What it says stays as it is."""
        self._asked.append((ask, ask()))

    def _is(self, owner: dict[str, Any], name: str, value: object) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(value)

    def tensor(
        self, held: dict[str, Any], name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype] = WEIGHTS
    ) -> int:
        """The address of held[name], which must be dense, on the CPU and of this shape."""
        tensor = held.get(name)
        if not (
            isinstance(tensor, Tensor)
            and tensor.device.type == "cpu"
            and tensor.dtype in dtypes
            and tensor.shape == torch.Size(shape)
            and tensor.is_contiguous()
        ):
            raise NotInOneCall(f"{name} is not a dense tensor of shape {tuple(shape)} on the CPU, of {dtypes}")
        self._tensors.append(tensor)
        self._is(held, name, tensor)
        return tensor.data_ptr()

    def parameter(self, module: nn.Module, name: str, *shape: int) -> int:
        """The address of a parameter in fp32."""
        return self.tensor(module._parameters, name, shape)

    def weight(self, module: nn.Module, name: str, *shape: int, transposed: bool = False) -> NativeWeight:
        """A parameter that products read: [I, O] or [E, I, O], or transposed [O, I]."""
        weight = NativeWeight(wide=self.parameter(module, name, *shape))
        parameter = module._parameters[name]
        assert parameter is not None
        panels = kept_panels(parameter, transposed=transposed) if self.keeps else None
        if panels is not None:
            self._copied.append(parameter)
            self._copies.append(panels)
            weight.panels = panels.data_ptr()
        return weight

    def buffer(self, module: nn.Module, name: str, *shape: int) -> int:
        """The address of a buffer in fp32."""
        return self.tensor(module._buffers, name, shape)

    def begin(self) -> None:
        """All is described."""
        self._lay = self._facts()

    def holds(self) -> bool:
        """Whether all of it still is and lies as it was described."""
        # Hundreds of looks per token: loops in C.
        return (
            not any(self._empty)
            and all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and all(ask() == answer for ask, answer in self._asked)
            and self._facts() == self._lay
        )

    def _facts(self) -> tuple[list[object], ...]:
        """What tells that the same tensors lie where they lay, as they lay, and that no copied one was written to."""
        return *(list(map(fact, self._tensors)) for fact in FACTS), list(map(VERSION, self._copied))
