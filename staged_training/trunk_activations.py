"""What the branches of a plan read at their boundary: the trunk's activations, stored once for all of them, and what
that has cost.

Legend: B batch, T tokens, D model width.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from foundation.files import fingerprint
from lm.model import RESIDUAL_DTYPE, LanguageModel
from staged_training.activation_cache import ActivationBatches, CacheIdentity, cached_activations, weights_hash
from staged_training.data import Batches, PrefixBatches, TokenBatches, prefix_activations
from staged_training.flops import caching_flops
from staged_training.plan import Plan
from staged_training.processes import Processes
from staged_training.record import Ledger, add_cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkSource:
    """A trained trunk, from which branches read.

    Attributes:
        whole: all of it.
        prefix: what computes its activations, of several processes each one's part; made when it is needed.
        folder: of its run.
        means: experts per token of every block, over its training.
        processes: that compute them together; all call what is below.
    """

    plan: Plan
    whole: LanguageModel
    prefix: Callable[[], LanguageModel]
    folder: Path
    means: tuple[float, ...]
    processes: Processes


def branch_batches(
    trunk: TrunkSource, train: TokenBatches, valid: TokenBatches, *, stored: bool
) -> tuple[tuple[Batches, Batches], Ledger | None]:
    """Training and validation batches as branches read them: tokens where they train the whole network, else stored
    activations, or a frozen prefix run each time. Of several processes each has its rows.

    Returns:
        the batches, and the trunk's ledger where it has changed.

    Raises:
        DiskFullError: before anything is computed.
    """
    plan, processes, ledger = trunk.plan, trunk.processes, None
    batches: list[Batches] = [train, valid]
    if plan.boundary and stored:
        used = tuple(sorted({int(batch) for batch in plan.branch_batches()}))
        splits = (("train", train, used), ("valid", valid, tuple(range(len(valid)))))
        for number, (split, tokens, numbers) in enumerate(splits):
            batches[number], paid = _paid_activations(trunk, tokens, split=split, numbers=numbers)
            ledger = paid or ledger
    rows = [processes.own_rows(each, plan.batch_size) for each in batches]
    if plan.boundary and not stored:
        rows = [PrefixBatches(each, trunk.prefix(), plan.boundary) for each in rows]
    return (rows[0], rows[1]), ledger


def _paid_activations(
    trunk: TrunkSource, tokens: TokenBatches, *, split: str, numbers: tuple[int, ...]
) -> tuple[ActivationBatches, Ledger | None]:
    """The x_BTD that enter block `plan.boundary`, in a folder of their own below the trunk's, with what they cost in
    the trunk's ledger.

    Args:
        tokens: the batches of `split`, "train" or "valid".
        numbers: of the batches wanted, ascending.

    Returns:
        the stored batches, and the trunk's ledger where it has changed.
    """
    processes = trunk.processes
    began, computed = time.perf_counter(), False

    def compute(tokens_BT: Tensor) -> Tensor:
        nonlocal computed
        computed = True
        rows_BT = processes.rows_of(tokens_BT)
        return processes.all_rows(prefix_activations(trunk.prefix(), rows_BT, trunk.plan.boundary))

    # Branches that train side by side all come here first; one computes what is missing.
    with processes.exclusive(trunk.folder, wait=True):
        identity, folder = _identity(trunk, split, numbers)
        stored = cached_activations(folder, identity, tokens, compute, processes)

        def paid() -> Ledger | None:
            # A process that died behind the activations, ahead of the ledger, has left what nobody has paid for. Other
            # comparisons may have added to the ledger since this one read it, so it is read anew.
            if not computed and Ledger.load(trunk.folder).holds("caching", folder.name):
                return None
            flops = caching_flops(trunk.plan, trunk.means, n_batches=len(numbers))
            seconds = time.perf_counter() - began
            return add_cost(trunk.folder, "caching", flops=flops, seconds=seconds, part=folder.name)

        ledger = processes.from_first(paid)
    if computed:
        size = stored.identity.n_bytes / 2**20
        print(f"activations {split}: {len(numbers)} batches, {size:.1f} MiB in {stored.folder}", flush=True)
    return stored, ledger


def _identity(trunk: TrunkSource, split: str, numbers: tuple[int, ...]) -> tuple[CacheIdentity, Path]:
    # Buffers too: thresholds and selection biases decide what the prefix computes as much as weights do.
    plan, weights = trunk.plan, trunk.whole.state_dict()
    identity = CacheIdentity(
        trunk=plan.trunk_hash,
        weights=weights_hash({name: weights[name] for name in trunk.whole.frozen_names(plan.boundary)}),
        boundary=plan.boundary,
        tokens=f"{split} {plan.corpus.content_hash}",
        batches=numbers,
        shape=(plan.batch_size, plan.seq_len, plan.model.d_model),
        dtype=RESIDUAL_DTYPE,
    )
    # The name says which activations, the manifest whose: a trunk trained anew finds its old cache stale.
    name = f"{split}_boundary_{plan.boundary}_{fingerprint(numbers)[:8]}"
    return identity, trunk.folder / "activations" / name
