"""Top-k with a number of experts of each layer's own (LExI, Chitty-Venkata et al., arXiv 2509.02753).

LExI finds the numbers after training, from how far a layer's output moves on random inputs; `python -m lm
layer-experts` finds them by what the loss on held-out text says (`lm/layer_experts.py`).

Legend: K slots per token.
"""

import dataclasses
import math

from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTopK(PolicyConfig):
    """The same number of experts for every token, another one in every layer.

    Attributes:
        layers: experts per token of each layer, lowest first; repeated where there are more layers.
    """

    layers: tuple[int, ...] = (12,)

    @property
    def assumed_experts(self) -> float:
        return math.fsum(self.layers) / max(1, len(self.layers))

    @property
    def evaluated_experts(self) -> float:
        return self.assumed_experts

    @property
    def varies_by_token(self) -> bool:
        return False

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "LayerTopKPolicy":
        return LayerTopKPolicy(self, n_experts=n_experts, layer_index=layer_index)


class LayerTopKPolicy(Policy):
    def __init__(self, config: LayerTopK, *, n_experts: int, layer_index: int) -> None:
        super().__init__(config)
        if not config.layers:
            raise ValueError("LayerTopK.layers = () names no number; legal: at least one")
        self.k = config.layers[layer_index % len(config.layers)]
        check_k(f"LayerTopK.layers[{layer_index % len(config.layers)}]", self.k, n_experts)

    @property
    def asked_experts(self) -> float:
        return self.k

    def select(self, scores: Scores) -> Slots:
        return Slots(*best(scores, self.k))
