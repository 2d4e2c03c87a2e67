"""Random k: one draw of k per training step, so that any k works at inference (Matryoshka MoE, arXiv 2509.26520).

The draw is a pure function of (seed, step, layer): a resumed or recomputed step repeats it without any saved random
state. Outside training the router takes `k_eval` experts.

Legend: K slots per token.
"""

import dataclasses
import random
from typing import Literal

from routing.policy import Policy, PolicyConfig, Scores, Slots, best, check_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomK(PolicyConfig):
    """A number of experts drawn anew for each training step, so that any number works at inference.

    Attributes:
        k_min: least experts per token in training.
        k_max: most experts per token in training; k is uniform in between.
        k_eval: experts per token outside training.
        per: one draw per "layer" (the paper's best), or per "step" for the whole model.
    """

    k_min: int = 4
    k_max: int = 20
    k_eval: int = 12
    per: Literal["layer", "step"] = "layer"

    @property
    def assumed_experts(self) -> float:
        return (self.k_min + self.k_max) / 2

    @property
    def evaluated_experts(self) -> int:
        return self.k_eval

    @property
    def varies_by_token(self) -> bool:
        return False

    def build(self, *, n_experts: int, d_model: int, layer_index: int) -> "RandomKPolicy":
        return RandomKPolicy(self, n_experts=n_experts, layer_index=layer_index)


def draw_k(config: RandomK, *, seed: int, step: int, layer_index: int) -> int:
    """The k of one layer in one training step."""
    place = layer_index if config.per == "layer" else "all"
    # Seeding with a string hashes it with SHA-512, so neighbouring steps and layers are unrelated, on every platform.
    return random.Random(f"random_k/{seed}/{step}/{place}").randint(config.k_min, config.k_max)


class RandomKPolicy(Policy):
    def __init__(self, config: RandomK, *, n_experts: int, layer_index: int) -> None:
        super().__init__(config)
        check_k("RandomK.k_min", config.k_min, n_experts)
        check_k("RandomK.k_max", config.k_max, n_experts)
        check_k("RandomK.k_eval", config.k_eval, n_experts)
        if config.k_min > config.k_max:
            raise ValueError(f"RandomK.k_min = {config.k_min} exceeds k_max = {config.k_max}")
        if config.per not in ("layer", "step"):
            raise ValueError(f"RandomK.per = {config.per!r} is not one of 'layer', 'step'")
        self.layer_index = layer_index
        self.k = config.k_eval

    def begin_step(self, step: int, seed: int) -> None:
        self.k = draw_k(self.config, seed=seed, step=step, layer_index=self.layer_index)

    @property
    def asked_experts(self) -> float:
        return self.k if self.training else self.config.k_eval

    def select(self, scores: Scores) -> Slots:
        return Slots(*best(scores, self.k if self.training else self.config.k_eval))
