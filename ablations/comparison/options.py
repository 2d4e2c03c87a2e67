"""What a comparison can be told, and its defaults: the quick run that `make ablation` makes on two CPU cores.

`--tokens` is the dial: the token budget of one method, trunk plus one branch. Everything else can stay.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from attention.config import AttentionConfig
from attention.kinds import describe_letters
from corpus.prepare import CorpusConfig
from foundation.numbers import check_numbers
from lm.config import ModelConfig
from lm.precision import fast_dtype
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from staged_training.execute import ExecutionConfig
from staged_training.optimizer import OptimizerConfig
from staged_training.staging import StagingConfig

LAYER_PLAN_HELP = f"one letter per layer, repeated to the depth: {describe_letters()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The baseline's model, which is also the trunk's: the options of the command line that size it.

    Attributes:
        n_layers: blocks.
        d_model: width of the residual stream.
        layer_plan: kinds of attention, see `attention.kinds`.
        n_heads, n_kv_heads, head_dim: query heads, key/value heads and their width.
        window: tokens that a sliding-window layer sees.
        n_experts: experts per layer.
        d_expert: hidden width of an expert.
        d_shared: hidden width of the expert that every token passes; 0 for none.
        k: experts per token of the baseline, and in the mean of every routing method.
        dtype: of products; "auto" is bf16 where this machine is fast at it.
    """

    n_layers: int = 4
    d_model: int = 128
    layer_plan: Annotated[str, tyro.conf.arg(help=LAYER_PLAN_HELP)] = "SSSF"
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    window: int = 64
    n_experts: int = 80
    d_expert: int = 16
    d_shared: int = 0
    k: int = 12
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def config(self, vocab_size: int) -> ModelConfig:
        """The model's configuration.

        Args:
            vocab_size: of the tokenizer that the text was prepared with, which is not known before.

        Raises:
            ValueError: for sizes that do not fit together, naming the field.
        """
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            layer_plan=self.layer_plan,
            attention=AttentionConfig(
                n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim, window=self.window
            ),
            moe=MoEConfig(
                n_experts=self.n_experts,
                d_expert=self.d_expert,
                d_shared=self.d_shared,
                router=RouterConfig(policy=TopK(k=self.k)),
            ),
            dtype=fast_dtype() if self.dtype == "auto" else self.dtype,
        )


# Eleven minutes of `make ablation` on two quiet CPU cores. Nothing is frozen: where half of the parameters were,
# branches could not be told from guessing the order of full runs (notes/results/agreement).
STAGING = StagingConfig(
    tokens=500_000,
    trunk_share=0.85,
    freeze=0.0,
    batch_size=4,
    seq_len=256,
    learning_rate=7e-3,
    optimizer=OptimizerConfig(kind="muon", embedding_rate=70),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to compare.

    Attributes:
        seeds: branches per method and trunk, paired by seed with the baseline's.
        trunk_seeds: trunks; more than one puts trunk noise into the intervals, at the price of that many trunks.
        jobs: runs that train side by side, in processes that share the threads; 0 for one per thread on a CPU and one
            on a GPU. Results do not depend on it. On a cluster, jobs; 0 for one per run.
        executor: "local" for processes of this machine, "slurm" for jobs of a cluster, see `comparison.slurm`.
        slurm: what jobs ask of the cluster, as words KEY=VALUE with submitit's names: partition=gpu time=120
            gpus_per_node=1; time in minutes.
        out: folder of all runs. Comparisons under the same folder share their corpus, trunks and branches.
        dry_run: print the plan, the resolved options and the environment, and run nothing.
        budget_batches: validation batches on which the trained weights are evaluated at other mean numbers of experts.

    Raises:
        ValueError: for a number below 1, or words for a cluster that are none, naming the option.
    """

    seeds: int = 3
    trunk_seeds: int = 1
    jobs: int = 0
    executor: Literal["local", "slurm"] = "local"
    slurm: tuple[str, ...] = ()
    out: Path = Path("runs")
    dry_run: bool = False
    budget_batches: int = 2
    model: Annotated[ModelOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=ModelOptions)
    staging: Annotated[StagingConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=lambda: STAGING)
    corpus: Annotated[CorpusConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: CorpusConfig(valid_share=0.06)
    )
    execution: Annotated[ExecutionConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=ExecutionConfig
    )

    def __post_init__(self) -> None:
        check_numbers(self, seeds=1, trunk_seeds=1, jobs=0, budget_batches=1)
        if self.slurm and self.executor != "slurm":
            raise ValueError(f"Options.slurm: {' '.join(self.slurm)}, needs --executor slurm")
        for word in self.slurm:
            if not all(word.partition("=")):
                raise ValueError(f"Options.slurm: {word!r}, must be KEY=VALUE")
