"""What every attention layer shares: how it is called, what it refuses, how its weights start.

Legend: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from attention.layer_states import KV, Alias, LayerState, MixedState
from attention.norm import RMSNorm
from attention.plan import LETTERS
from attention.projection import Projection


class AttentionLayer(nn.Module):
    """Base of all layers. Calls look alike for every letter:

        y_BTD, kv = layer(x_BTD, start=0, state=None, shared=None)

    x_BTD holds the tokens at positions start .. start + T - 1; `state` is this layer's entry of a `HybridCache`,
    updated in place; `shared` is the kv that the owning layer returned in this same forward (R and r only). y_BTD has
    the dtype of x; kv is what F and S offer for reuse, else None. Parameters are fp32 and cast to the dtype of x at
    use; norms, gates, decays and recurrent states are computed in fp32.

    Raises:
        ValueError: for an input of another width, a `start` that is not the cache's length, a cache that is too short,
            of another batch size or of another kind of layer, and for missing or misplaced `shared`; names the layer.
    """

    state_type: type[LayerState] | type[MixedState] | type[Alias]

    def __init__(self, letter: str, *, d_model: int, layer_index: int, n_layers: int) -> None:
        super().__init__()
        self.letter = letter
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
                nn.init.ones_(module.weight)

    def forward(
        self, x_BTD: Tensor, *, start: int = 0, state=None, shared: KV | None = None
    ) -> tuple[Tensor, KV | None]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"letter={self.letter}, layer_index={self.layer_index}"

    def refuse(self, problem: str) -> ValueError:
        """The error for a call that does not fit, naming this layer."""
        return ValueError(f"attention layer {self.layer_index} ({self.letter}, {LETTERS[self.letter]}): {problem}")

    def check_call(self, x_BTD: Tensor, start: int, state) -> None:
        """Raises ValueError where input, position and cache do not fit together."""
        if x_BTD.dim() != 3 or x_BTD.shape[-1] != self.d_model or x_BTD.shape[1] == 0:
            raise self.refuse(f"input of shape {tuple(x_BTD.shape)}; legal: [batch, tokens >= 1, {self.d_model}]")
        if start < 0:
            raise self.refuse(f"start={start}; legal: at least 0")
        if state is None:
            return
        if not isinstance(state, self.state_type):
            raise self.refuse(
                f"state is a {type(state).__name__}; legal: a {self.state_type.__name__}, from a HybridCache of the"
                " same plan"
            )
        B, T, _ = x_BTD.shape
        if state.batch_size != B:
            raise self.refuse(f"input has batch size {B}, the cache {state.batch_size}; legal: the same")
        if isinstance(state, Alias):
            if start + T != state.length:
                raise self.refuse(
                    f"tokens {start} to {start + T - 1} after the owner of the keys took {state.length}; legal: first"
                    " the owner"
                )
        elif start != state.length:
            raise self.refuse(
                f"start={start}, but the cache has seen {state.length} tokens; legal: start={state.length}"
            )
        if start + T > state.max_length:
            raise self.refuse(
                f"tokens {start} to {start + T - 1} do not fit a cache made for {state.max_length}; legal: a longer"
                " max_length"
            )
