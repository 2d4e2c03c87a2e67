"""A model that generates while its budget changes: what the terminal and the server run.

Legend: B batch, T tokens, L layers.
"""

import copy
import dataclasses
import math
from collections.abc import Generator
from pathlib import Path

import torch
from torch import Tensor

from demos.runs import ShownRun, shown_run
from lm.budget import cap_of, counted_layers, set_budget
from lm.generate import GeneratedToken, generate
from lm.generation_trace import End
from lm.pretrained import has_calibration_tokens, load_calibration_tokens, load_pretrained, load_tokenizer
from lm.sampling import SamplingConfig
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.policy import Policy
from routing.router import Router

# A budget is moved while somebody waits for the next token: thresholds are set on this many tokens, from all parts of
# the text stored with a model, and hold the mean to a few per cent.
CALIBRATION_TOKENS = 8192


class LiveModel:
    """A model whose mean number of experts can be set between two tokens.

    Args:
        folder: of the model.
        static: a budget gives every token the same number; otherwise the layers' own policies decide how many each
            gets, and layers with one number for all tokens take top-p.

    Attributes:
        budget: mean experts per token asked for; None as trained.
        end: why the last generation ended.
    """

    def __init__(self, folder: Path, *, static: bool = False) -> None:
        self.folder, self.static = folder, static
        self.model = load_pretrained(folder, "cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder, self.model)
        self.budget: float | None = None
        self.end: End = "length"
        self._trained = self._policies()
        # Setting one again costs nothing.
        self._held: dict[float, list[tuple[Policy, Tensor | None]]] = {}

    @property
    def run(self) -> ShownRun:
        """What the model is."""
        return shown_run(self.folder)

    @property
    def layers(self) -> tuple[int, ...]:
        """Those over which a token's number of experts is averaged."""
        return counted_layers(self.model)

    @property
    def cap(self) -> int:
        """The most experts of any token."""
        return cap_of(self.model)

    def twin(self, *, static: bool = False) -> "LiveModel":
        """The same weights, in the same memory, with budgets of its own."""
        other = copy.copy(self)
        own = {id(tensor): tensor for tensor in self.model.parameters()}
        other.model = copy.deepcopy(self.model, own)
        other.static, other.budget, other._held = static, None, {}
        other._trained = other._policies()
        return other

    def set_budget(self, mean: float | None) -> None:
        """Every layer uses `mean` experts per token on average from the next token on; None: as trained.

        Raises:
            ValueError: for a mean that the model cannot hold, which changes nothing, or a model without text to
                calibrate on.
        """
        if mean is not None and not 0 < mean <= (limit := self.most()):
            raise ValueError(f"budget: {mean:g} experts per token; legal: above 0, at most {limit}")
        if mean is not None and self.static and mean != int(mean):
            raise ValueError(f"budget: {mean:g} experts for every token; legal: a whole number")
        if mean is None:
            self._restore(self._trained)
        elif self.static:
            for router in self._choosing():
                same = router.policy.config if isinstance(router.policy.config, TopK) else TopK()
                router.set_policy(dataclasses.replace(same, k=int(mean)))
        elif mean in self._held:
            self._restore(self._held[mean])
        else:
            self._calibrate(mean)
        self.budget = mean

    def most(self) -> int:
        """The largest budget."""
        if self.static:
            return min(router.n_experts for router in self._choosing())
        caps = [router.policy.config.cap for router in self._choosing() if isinstance(router.policy.config, TopP)]
        return min([self.cap, *caps])

    def mean_asked(self) -> float:
        """Experts per token that the layers aim at now, in the mean over those that vary."""
        routers = self.model.routers()
        asked = [routers[layer].policy.config for layer in self.layers]
        return sum(config.held_mean or config.assumed_experts for config in asked) / len(asked)

    def stream(
        self, prompt: list[int], *, max_new_tokens: int, sampling: SamplingConfig
    ) -> Generator[GeneratedToken, None, None]:
        """Tokens behind the prompt. Between two of them the budget may change."""
        count, self.end = 0, "length"
        for step in generate(
            self.model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=self.tokenizer.boundary_id
        ):
            count += 1
            yield step
        if count < max_new_tokens:
            self.end = "document"

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt at the start of a document."""
        return [self.tokenizer.boundary_id, *self.tokenizer.encode(text)]

    def calibration_BT(self) -> Tensor | None:
        """Text on which budgets are set; None for a model that was saved without."""
        if not has_calibration_tokens(self.folder):
            return None
        tokens_BT = load_calibration_tokens(self.folder)
        rows = max(1, math.ceil(CALIBRATION_TOKENS / tokens_BT.shape[1]))
        return tokens_BT[:: max(1, len(tokens_BT) // rows)][:rows].to(self.model.embedding_VD.device)

    def _choosing(self) -> list[Router]:
        # A block of a single expert is a dense MLP.
        return [router for router in self.model.routers() if router.n_experts > 1]

    def _policies(self) -> list[tuple[Policy, Tensor | None]]:
        """Every layer's policy, and its threshold as it is now."""
        policies = [router.policy for router in self.model.routers()]
        return [(policy, None if policy.budget is None else policy.budget.threshold.clone()) for policy in policies]

    def _restore(self, policies: list[tuple[Policy, Tensor | None]]) -> None:
        for router, (policy, threshold) in zip(self.model.routers(), policies):
            router.policy = policy
            if policy.budget is not None and threshold is not None:
                policy.budget.threshold.copy_(threshold)

    def _dynamic(self, mean: float) -> None:
        """Layers with one number for all tokens get a policy that can vary it; nothing else changes."""
        for router in self._choosing():
            if router.policy.budget is None:
                cap = min(router.n_experts, max(TopP.cap, math.ceil(mean)))
                router.set_policy(TopP(target_mean=mean, cap=cap))

    def _calibrate(self, mean: float) -> None:
        tokens_BT = self.calibration_BT()
        if tokens_BT is None:
            raise ValueError(f"{self.folder} was saved without text to set a budget on: only 'as trained' is possible")
        before = self._policies()
        try:
            self._dynamic(mean)
            set_budget(self.model, mean, tokens_BT)
        except ValueError:
            self._restore(before)
            raise
        self._held[mean] = self._policies()
