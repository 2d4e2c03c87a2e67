"""What a kind of attention says about itself, and the base of its layers.

A kind is one letter of a layer plan. Its file declares the layer (`AttentionLayer`) and everything others want to know
about it (`AttentionKind`): they ask, and never look at the letter.

Legend: B batch, T tokens, D model width.
"""

import abc
import dataclasses

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.layer_states import KV, Alias, LayerState
from attention.norm import RMSNorm
from attention.positions import Start
from attention.projection import Projection
from foundation.exact_buffers import ExactBuffers
from triton_kernels.native.decode_step import NativeBlock, NotInOneCall, Watch


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionKind(abc.ABC):
    """One letter of the layer plan. Every kind subclasses this, and `attention/kinds.py` lists its instances.

    Attributes:
        letter: a single character, the kind's name in a layer plan.
        sentence: what the letter stands for, as help texts and errors show it.
        layer: class of its layers.
        state_type: what `new_state` returns and its layers update; `Alias` for a kind that reads another's.
        reads: letter of the kind whose keys and values such a layer reuses, those of the nearest one below it; None
            for a kind that keeps what it remembers itself.
        in_c: whether a compiled form computes on a CPU nearly all that its layers take time for in training.
        shared_fields: fields of `AttentionConfig` in which a layer that reads must agree with the layer that owns.
    """

    letter: str
    sentence: str
    layer: "type[AttentionLayer]"
    state_type: type[LayerState]
    reads: str | None = None
    in_c: bool = False
    shared_fields: tuple[str, ...] = ()

    def check(self, config: AttentionConfig) -> None:  # noqa: B027
        """Refuses a configuration that such a layer cannot have though other kinds can.

        Raises:
            ValueError: naming the field, its value and what is legal.
        """

    @abc.abstractmethod
    def new_state(
        self, config: AttentionConfig, *, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> LayerState:
        """An empty state of `batch_size` sequences, allocated for `max_length` tokens of each. Not asked of a kind that
        reads another's.

        Args:
            dtype: of the activations. What sums over the whole text is kept in fp32 whatever this is.
        """

    @abc.abstractmethod
    def state_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """Bytes per sequence, after `length` tokens, of the state that such a layer decodes from: its own, or the one
        it reads. What `new_state` allocates for that length has as many.

        Args:
            element_size: bytes per element of the activations' dtype.
        """

    @abc.abstractmethod
    def mixing_flops(self, config: AttentionConfig, length: int) -> float:
        """Forward FLOPs per token of mixing across tokens, without the projections, averaged over a causal sequence of
        `length` tokens; a multiply-add is 2."""

    def eight_bit_bytes(self, config: AttentionConfig, length: int, element_size: int) -> int:
        """`state_bytes` where keys and values are stored in 8 bits; the same for a kind that has none."""
        return self.state_bytes(config, length, element_size)

    def read_bytes(self, config: AttentionConfig, length: int, element_size: int, *, eight_bits: bool = False) -> int:
        """Bytes of cache per sequence that decoding one more token after `length` reads: the whole state, unless a kind
        says otherwise."""
        return (self.eight_bit_bytes if eight_bits else self.state_bytes)(config, length, element_size)


class AttentionLayer(ExactBuffers):
    """Base of all layers. Calls look alike for every kind:

        y_BTD, kv = layer(x_BTD, start=0, state=None, shared=None)

    x_BTD holds the tokens at positions start .. start + T - 1, or one token of each sequence at the positions start_B;
    `state` is this layer's entry of a `HybridCache`,
    updated in place; `shared` is the kv that the owning layer returned in this same forward, for kinds that read
    another's. y_BTD has the dtype of x; kv is what a layer offers for reuse, else None. Parameters are fp32 and cast to
    the dtype of x at use; norms, gates, decays and recurrent states are computed in fp32. Construction draws nothing:
    weights are what `init_weights` makes them.

    Args:
        kind: what the layer's letter stands for.
        config: its heads, widths and options.
        d_model: the D above.
        layer_index: from 0 at the embedding.
        n_layers: depth of the model.

    Raises:
        ValueError: for an input of another width, a `start` that is not the cache's length, a cache that is too short,
            of another batch size or of another kind of layer, and for missing or misplaced `shared`; names the layer.
    """

    def __init__(
        self, kind: AttentionKind, config: AttentionConfig, *, d_model: int, layer_index: int, n_layers: int
    ) -> None:
        super().__init__()
        self.kind = kind
        self.config = config
        self.d_model = d_model
        self.layer_index = layer_index
        # Each layer adds its output to the residual stream twice with its experts: this keeps the sum's variance
        # independent of the depth.
        self.output_gain = (2 * n_layers) ** -0.5

    def init_weights(self, generator: torch.Generator) -> None:
        """Fresh weights for the whole layer, from the generator alone."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.draw(generator)
            elif isinstance(module, RMSNorm):
                module.reset()

    def forward(
        self, x_BTD: Tensor, *, start: Start = 0, state: LayerState | None = None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        raise NotImplementedError

    def describe(self, block: NativeBlock, watch: Watch, state: LayerState) -> None:
        """Fills in this layer's part of a decode step that is one call of C (`lm/decode_step.py`).

        A class says this for itself alone: one derived from it may compute something else.

        Args:
            state: this layer's, of the same number of tokens as all others.

        Raises:
            NotInOneCall: where the call does not know such a layer or state.
        """
        raise NotInOneCall(f"attention of kind {self.kind.letter}")

    def describe_projections(self, block: NativeBlock, watch: Watch, heads: tuple[int, int, int], inner: int) -> None:
        """The part of `describe` that is alike for all kinds with `to_inner` and `to_out`.

        Args:
            heads: their number and the widths of key and value.
            inner: outputs of `to_inner`.
        """
        watch.module(self)
        watch.same(self, "config")
        block.heads, block.key, block.value = heads
        block.eps = self.config.norm_eps
        to_inner, to_out = self.get_submodule("to_inner"), self.get_submodule("to_out")
        if not isinstance(to_inner, Projection) or not isinstance(to_out, Projection):
            raise NotInOneCall("a projection that is another module")
        block.inner = inner
        block.to_inner = to_inner.describe(watch, self.d_model, inner)
        block.to_out = to_out.describe(watch, block.heads * block.value, self.d_model)

    def extra_repr(self) -> str:
        return f"letter={self.kind.letter}, layer_index={self.layer_index}"

    def refuse(self, problem: str) -> ValueError:
        """The error for a call that does not fit, naming this layer."""
        return ValueError(f"attention layer {self.layer_index} ({self.kind.letter}, {self.kind.sentence}): {problem}")

    def check_call(self, x_BTD: Tensor, start: Start, state: LayerState | None) -> None:
        """Raises ValueError where input, position and cache do not fit together."""
        if x_BTD.dim() != 3 or x_BTD.shape[-1] != self.d_model or x_BTD.shape[1] == 0:
            raise self.refuse(f"input of shape {tuple(x_BTD.shape)}; legal: [batch, tokens >= 1, {self.d_model}]")
        if isinstance(start, int) and start < 0:
            raise self.refuse(f"start={start}; legal: at least 0")
        if state is None:
            if isinstance(start, Tensor):
                raise self.refuse("a start for each sequence without a cache; legal: a number")
            return
        if not isinstance(state, self.kind.state_type):
            raise self.refuse(
                f"state is a {type(state).__name__}; legal: a {self.kind.state_type.__name__}, from a HybridCache of"
                " the same plan"
            )
        B, T, _ = x_BTD.shape
        if state.batch_size != B:
            raise self.refuse(f"input has batch size {B}, the cache {state.batch_size}; legal: the same")
        seen = state.length
        if isinstance(start, Tensor) or state.behind_B is not None:
            self._check_places(start, (B, T), state)
        elif isinstance(state, Alias):
            # The owner runs first and has counted these tokens already.
            seen -= T
            if start != seen:
                raise self.refuse(
                    f"tokens {start} to {start + T - 1} after the owner of the keys took {state.length}; legal: first"
                    " the owner"
                )
        elif start != seen:
            raise self.refuse(f"start={start}, but the cache has seen {seen} tokens; legal: start={seen}")
        if seen + T > state.max_length and not isinstance(state, Alias):
            raise self.refuse(
                f"tokens {seen} to {seen + T - 1} do not fit a cache made for {state.max_length}; legal: a longer"
                " max_length, or `grow`"
            )

    def _check_places(self, start: Start, shape: tuple[int, int], state: LayerState) -> None:
        """Sequences that have seen different numbers of tokens go on together, each from its own place."""
        B, T = shape
        if state.behind_B is None or not isinstance(start, Tensor) or start.shape != (B,):
            given = f"a start of shape {tuple(start.shape)}" if isinstance(start, Tensor) else f"start={start}"
            legal = "a number" if state.behind_B is None else f"int64 [{B}], the cache's `position`"
            raise self.refuse(
                f"{given} for a cache of {B} sequences of lengths {state.lengths_B.tolist()}; legal: {legal}"
            )
        if T != 1:
            raise self.refuse(
                f"{T} tokens of each of {B} sequences that have seen different numbers of them; legal: one at a time"
            )
