"""What the branches of a plan read at their boundary: the trunk's activations, stored once for all of them.

Legend: B batch, T tokens, D model width.
"""

from pathlib import Path

from torch import Tensor

from foundation.files import fingerprint
from lm.model import RESIDUAL_DTYPE, LanguageModel
from staged_training.activation_cache import ActivationBatches, CacheIdentity, cached_activations, weights_hash
from staged_training.data import TokenBatches, prefix_activations
from staged_training.plan import Plan


def trunk_activations(
    plan: Plan, trunk: LanguageModel, tokens: TokenBatches, *, split: str, numbers: tuple[int, ...], folder: Path
) -> tuple[ActivationBatches, bool]:
    """The x_BTD that enter block `plan.boundary`, in a folder of their own below `folder`.

    Args:
        trunk: whose frozen prefix computes what is not stored yet.
        tokens: the batches of `split`, "train" or "valid".
        numbers: of the batches wanted, ascending.

    Returns:
        the stored batches, and whether any of them had to be computed now.

    Raises:
        DiskFullError: before anything is computed.
    """
    # Buffers too: thresholds and selection biases decide what the prefix computes as much as weights do.
    boundary, weights = plan.boundary, trunk.state_dict()
    identity = CacheIdentity(
        trunk=plan.trunk_hash,
        weights=weights_hash({name: weights[name] for name in trunk.frozen_names(boundary)}),
        boundary=boundary,
        tokens=f"{split} {plan.corpus.content_hash}",
        batches=numbers,
        shape=(plan.batch_size, plan.seq_len, plan.model.d_model),
        dtype=RESIDUAL_DTYPE,
    )
    computed = False

    def compute(tokens_BT: Tensor) -> Tensor:
        nonlocal computed
        computed = True
        return prefix_activations(trunk, tokens_BT, boundary)

    # The name says which activations, the manifest whose: a trunk trained anew finds its old cache stale.
    name = f"{split}_boundary_{boundary}_{fingerprint(numbers)[:8]}"
    return cached_activations(folder / name, identity, tokens, compute), computed
