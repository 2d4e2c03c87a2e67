"""What a frozen model teaches: its distribution over the next token, from hidden states that are computed once.

loss = (1 - share) CE(text) + share tau^2 KL(p_original^(1/tau) || p_model^(1/tau)), both the mean over tokens in nats;
tau^2 keeps the gradient as large at any temperature (Hinton et al., arXiv 1503.02531). Of the original only the
residual stream behind its last block is stored, a thirtieth of its logits: its norm and head make these again.

Legend: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foundation.files import fingerprint
from foundation.serialize import to_dict
from lm.model import RESIDUAL_DTYPE, LanguageModel, token_losses
from staged_training.activation_cache import ActivationBatches, CacheIdentity, cached_activations, weights_hash
from staged_training.data import Batches, PrefixBatches, TokenBatches, prefix_activations
from staged_training.step import Forward
from triton_kernels.native.projection import project


class Teacher:
    """A frozen model as a source of logits.

    Args:
        model: in evaluation mode; what is left of it here is its norm and its head.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.norm, self.head_VD = model.norm, model.head
        self.dtype, self.scale = getattr(torch, model.config.dtype), model.config.logit_scale

    @torch.no_grad()
    def logits(self, x_BTD: Tensor) -> Tensor:
        """logits_BTV from the residual stream behind the last block."""
        x_BTD = (self.norm(x_BTD.to(getattr(torch, RESIDUAL_DTYPE))) * self.scale).to(self.dtype)
        return project(x_BTD, self.head_VD)


class Distillation:
    """The objective of `staged_training.step` with a teacher.

    Args:
        share: of the teacher in the loss, in [0, 1].
        temperature: by which both sides' logits are divided in the divergence.
    """

    def __init__(self, teacher: Teacher, *, share: float, temperature: float) -> None:
        self.teacher, self.share, self.temperature = teacher, share, temperature

    def __call__(self, model: LanguageModel, inputs: Any, targets_BT: Tensor, boundary: int) -> Forward:
        """Inputs are pairs of tokens_BT and the x_BTD that the teacher's last block made of them."""
        assert boundary == 0, "a student trains whole"
        tokens_BT, x_BTD = inputs
        output = model(tokens_BT)
        loss = token_losses(output.logits_BTV, targets_BT).mean()
        divergence = divergence_BT(output.logits_BTV, self.teacher.logits(x_BTD), self.temperature).mean()
        return Forward(output, (1 - self.share) * loss + self.share * self.temperature**2 * divergence, loss)


def divergence_BT(logits_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || model) of every token in nats, fp32 [B, T], of distributions at a temperature."""
    own_BTV, theirs_BTV = ((each.float() / temperature).log_softmax(dim=-1) for each in (logits_BTV, teacher_BTV))
    return functional.kl_div(own_BTV, theirs_BTV, reduction="none", log_target=True).sum(dim=-1)


class TaughtBatches:
    """Batches of tokens beside what the teacher's last block made of them: ((tokens_BT, x_BTD), targets_BT)."""

    def __init__(self, tokens: TokenBatches, states: Batches) -> None:
        self.tokens, self.states = tokens, states

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Any:
        tokens_BT, targets_BT = self.tokens[index]
        x_BTD, _ = self.states[index]
        return (tokens_BT, x_BTD), targets_BT


def teacher_states(
    original: LanguageModel, tokens: TokenBatches, numbers: Sequence[int], *, text: str, folder: Path | None
) -> tuple[Batches, int]:
    """The residual stream behind the last block of `original`, for batches `numbers`.

    Args:
        text: hash of the packed tokens.
        folder: where it is stored, in a folder of its own; None to compute it again each time.

    Returns:
        the batches, and how many had to be computed now.

    Raises:
        DiskFullError: before anything is computed.
    """
    n_layers, n_computed = original.config.n_layers, 0
    if folder is None:
        return PrefixBatches(tokens, original, n_layers), 0
    identity = CacheIdentity(
        trunk=fingerprint(to_dict(original.config)),
        weights=weights_hash(original.state_dict()),
        boundary=n_layers,
        tokens=f"train {text}",
        batches=tuple(sorted(set(numbers))),
        shape=(tokens.batch_size, tokens.seq_len, original.config.d_model),
        dtype=RESIDUAL_DTYPE,
    )

    def compute(tokens_BT: Tensor) -> Tensor:
        nonlocal n_computed
        n_computed += 1
        return prefix_activations(original, tokens_BT, n_layers)

    name = f"{identity.weights[:12]}_{fingerprint([text, *identity.batches, *identity.shape])[:8]}"
    stored: ActivationBatches = cached_activations(folder / name, identity, tokens, compute)
    return stored, n_computed
