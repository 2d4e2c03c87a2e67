"""What staged training will do, as data: a trunk trained once, and branches that start from it.

Nothing here runs anything: a plan can be printed, stored, hashed and compared before a minute is spent.
"""

import dataclasses
from pathlib import Path

import numpy as np

from foundation.files import fingerprint
from foundation.serialize import to_dict
from lm.config import ModelConfig
from staged_training.boundary import compose, different_blocks, refuse_other_trunk
from staged_training.code import CODE
from staged_training.data import branch_order, trunk_order
from staged_training.optimizer import OptimizerConfig
from staged_training.run import Run
from staged_training.schedule import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What a plan needs to know of the text.

    Attributes:
        content_hash: of the documents and the tokenizer: equal hash, equal tokens.
        train_tokens, valid_tokens: lengths of the packed streams.
        train_bytes, valid_bytes: UTF-8 bytes of the text in them.
        mixture: the share of every domain where the training text is mixed; empty where it is as it was prepared.
    """

    content_hash: str
    train_tokens: int
    train_bytes: int
    valid_tokens: int
    valid_bytes: int
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One method, one seed.

    Attributes:
        seed: order of the branch's batches, random draws of the routers, and the weights of fresh blocks.
        model: complete; below the boundary its layer plan is the trunk's.
        boundary: first block that trains; 0 trains everything, the embedding included.
        fresh: blocks from the boundary on are initialised from `seed` instead of taken from the trunk.
        rounding: the weights that it trains start changed by as much as rounding does, drawn from `seed`.
        code: fingerprints of what it is trained and measured by, see `code.code_behind`.
    """

    method: str
    seed: int
    model: ModelConfig
    stage: Stage
    boundary: int
    fresh: bool
    rounding: bool = False
    code: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique in a plan."""
        return f"{self.method}-seed{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A trunk and its branches.

    Attributes:
        model: the trunk's.
        n_calibration: batches of the training text that no stage ever sees: budgets are calibrated on them.
        trunk_seed: the trunk's weights, data order and draws.
        decisions: why the boundary is where it is, for people; not part of any identity.
        code: fingerprints of what the trunk is trained by, see `code.code_behind`.

    Raises:
        ValueError: for branches that do not fit the trunk or each other, naming branch and field.
    """

    corpus: CorpusFacts
    model: ModelConfig
    batch_size: int
    seq_len: int
    n_calibration: int
    trunk: Stage
    trunk_seed: int
    optimizer: OptimizerConfig
    branches: tuple[Branch, ...] = ()
    decisions: tuple[str, ...] = ()
    code: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [branch.name for branch in self.branches]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Plan.branches: {', '.join(duplicates)} more than once")
        for branch in self.branches:
            self._check(branch, self.branches[0])
        if not 0 < self.n_calibration < self._n_batches:
            raise ValueError(
                f"Plan.n_calibration: {self.n_calibration} of the training text's {self._n_batches} batches, must leave"
                " at least one"
            )

    @property
    def boundary(self) -> int:
        """The first block that trains in every branch; 0 where all do, or without branches."""
        return self.branches[0].boundary if self.branches else 0

    @property
    def fresh(self) -> bool:
        """Whether the blocks from the boundary on are initialised anew in every branch; False without branches."""
        return self.branches[0].fresh if self.branches else False

    @property
    def branch_stage(self) -> Stage | None:
        """Length and schedule of the first branch, which others may only be longer than; None without branches."""
        return self.branches[0].stage if self.branches else None

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that an update sees, predicted or not."""
        return self.batch_size * self.seq_len

    @property
    def _n_batches(self) -> int:
        return (self.corpus.train_tokens - 1) // self.tokens_per_batch

    @property
    def n_train_batches(self) -> int:
        """Batches in one epoch of the training text."""
        return self._n_batches - self.n_calibration

    def calibration_batches(self) -> np.ndarray:
        """The batch numbers that no stage ever sees, evenly spaced through the text, int64."""
        # One in the middle of each of as many equal parts: a text's domains lie one after the other.
        return (2 * np.arange(self.n_calibration) + 1) * self._n_batches // (2 * self.n_calibration)

    @property
    def trunk_identity(self) -> dict:
        """Everything the trunk's weights depend on. The branches are not part of it: comparisons share a trunk."""
        # Named one by one: `decisions` are words, and a field that is added must not rename the trunks of before.
        fields = ("corpus", "model", "batch_size", "seq_len", "n_calibration", "trunk", "trunk_seed", "optimizer", CODE)
        identity = {name: to_dict(getattr(self, name)) for name in fields}
        if not self.corpus.mixture:
            del identity["corpus"]["mixture"]
        return _with_known_code(identity)

    @property
    def trunk_hash(self) -> str:
        """Names the trunk's folder."""
        return fingerprint(self.trunk_identity)[:12]

    def branch_identity(self, branch: Branch) -> dict:
        """Everything the branch's weights depend on."""
        return {"trunk": self.trunk_identity, "branch": _with_known_code(to_dict(branch))}

    def trunk_run(self, folder: Path) -> Run:
        """The trunk's training, from its seed's weights, in `folder`."""
        return Run(
            label="trunk",
            method="trunk",
            branch_seed=None,
            stage=self.trunk,
            optimizer=self.optimizer,
            seed=self.trunk_seed,
            boundary=0,
            order=tuple(self.trunk_batches().tolist()),
            identity=self.trunk_identity,
            folder=folder,
        )

    def branch_run(self, branch: Branch, folder: Path) -> Run:
        """A branch's training, from the fork of the trunk, in `folder`."""
        return Run(
            label=branch.name,
            method=branch.method,
            branch_seed=branch.seed,
            stage=branch.stage,
            optimizer=self.optimizer,
            seed=branch.seed,
            boundary=branch.boundary,
            order=tuple(self.order_of(branch).tolist()),
            identity=self.branch_identity(branch),
            folder=folder,
        )

    def trunk_batches(self) -> np.ndarray:
        """Batch numbers in the order the trunk visits them, int64."""
        return self.numbers(0, self.trunk.n_batches)

    def branch_batches(self) -> np.ndarray:
        """The batches behind the trunk's last position, in the trunk's order: the data of the longest branch, whose
        beginning is that of the others."""
        return self.numbers(self.trunk.n_batches, max((branch.stage.n_batches for branch in self.branches), default=0))

    def order_of(self, branch: Branch) -> np.ndarray:
        """Batch numbers in the order this branch visits them: its method plays no part, its seed does."""
        return branch_order(self.branch_batches()[: branch.stage.n_batches], branch.seed)

    def numbers(self, start: int, count: int) -> np.ndarray:
        """Batch numbers at positions [start, start + count) of the trunk's endless sequence, int64; calibration batches
        never occur."""
        trained = np.setdiff1d(np.arange(self._n_batches), self.calibration_batches())
        return trained[trunk_order(self.n_train_batches, self.trunk_seed, start, count)]

    def _check(self, branch: Branch, first: Branch) -> None:
        refuse_other_trunk(self.model, branch.model, branch.name)
        if branch.stage.n_batches < first.stage.n_batches:
            raise ValueError(
                f"{branch.name} trains on {branch.stage.n_batches} batches, {first.name} on {first.stage.n_batches}:"
                " only a control that is known to be better for it may differ, and only by more"
            )
        # What `boundary` and `fresh` say of all.
        for field in ("boundary", "fresh"):
            if getattr(branch, field) != getattr(first, field):
                raise ValueError(
                    f"{branch.name} and {first.name} differ in {field}: branches of a plan can only be compared when"
                    " they agree"
                )
        if branch.model != compose(self.model, branch.model, branch.boundary):
            raise ValueError(
                f"{branch.name}: the layers, experts and routers below its boundary {branch.boundary} are not the"
                " frozen trunk's"
            )
        different = different_blocks(self.model, branch.model)
        if different and not branch.fresh:
            raise ValueError(
                f"{branch.name} changes the letter or weights of blocks {different} and cannot take the trunk's there;"
                " set fresh=True"
            )


def _with_known_code(identity: dict) -> dict:
    """Without an entry for code where there is none, as runs from before it was recorded have it."""
    return {name: value for name, value in identity.items() if name != CODE or value}
