"""Training in several processes: data parallel over the rows of a batch, expert parallel over the experts, FSDP2 for
all other weights.

The processes form a mesh of data x expert. Every process has rows of its own in each batch. Experts are spread over the
expert dimension (`moe.expert_parallel`) and cut once more over the data dimension; all other weights are cut over all
processes and gathered block by block as they are needed (FSDP2). Gradients are means over processes, so they are those
of one process with the whole batch. torch.distributed does all of it: DeviceMesh, DTensor, fully_shard, and distributed
checkpoints, which any number of processes can load.

This is the one file of this folder that unpickles: the index of a distributed checkpoint says as a pickle which tensor
lies in which file, and what processes of one run send each other (`from_first`) travels as one. A checksum shows that a
file is as it was written, not who wrote it: continue runs of your own only.
"""

import contextlib
import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from foundation.environment import under_torchrun
from foundation.files import write_json
from foundation.stopping import Interrupted
from lm.block import Block
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.expert_parallel import ExpertParallelExperts
from routing.over_processes import count_over_processes
from routing.router import Router
from staged_training import checkpoint
from staged_training.data import OwnRows, TokenBatches
from staged_training.merging import WeightAverage
from staged_training.processes import Made, Processes, continuable
from staged_training.progress import MetricsFile, NoMetrics
from staged_training.record import locked
from staged_training.run import Run

SHARDS = "shards"
# Of processes that wait for the first; where it dies, torchrun ends them.
PATIENCE = datetime.timedelta(days=7)


class ManyProcesses(Processes):
    """The processes that torchrun started, inside `process_group`; `n_expert` of them share one set of experts, all
    where it is 0.

    Raises:
        ValueError: when the processes cannot be arranged so.
    """

    many = True

    def __init__(self, n_expert: int, device: torch.device) -> None:
        self.n, self.rank, self.device = dist.get_world_size(), dist.get_rank(), device
        self.first = self.rank == 0
        n_expert = n_expert or self.n
        if n_expert < 1 or self.n % n_expert:
            raise ValueError(
                f"expert_parallel: {n_expert} processes per set of experts do not divide the {self.n} processes of"
                " this run"
            )
        shape = (self.n // n_expert, n_expert)
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "expert"))
        # In torch's own use of meshes, too, this is how all dimensions become one; a second mesh would need connections
        # of its own.
        self.everyone = self.mesh._flatten("all")
        self.group = self.everyone.get_group()
        # What one process does while the others wait for it (preparing text, sealing a checkpoint) takes as long as it
        # takes; a collective of the backend would be taken for stuck after ten or thirty minutes.
        self.patient = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))

    def __str__(self) -> str:
        n_data, n_expert = self.mesh.shape
        return (
            f"processes  {self.n} ({dist.get_backend()}): {n_data} x data, {n_expert} x experts; each with its own rows"
            " of every batch"
        )

    def shard(self, model: LanguageModel) -> LanguageModel:
        """Cuts the weights of a whole model, the same in all processes, in place.

        Raises:
            ValueError: for sizes that cannot be divided, and for a routing policy that needs to see the whole batch.
        """
        n_data, n_expert = self.mesh.shape
        _refuse(model.config, n_data, n_expert)
        for block in model.blocks:
            if n_expert > 1:
                moe = cast(Block, block).moe
                moe.experts = ExpertParallelExperts(moe.experts, self.mesh["expert"])
                # Not over the dimension that expert parallelism has cut already: rows of experts would lie interleaved.
                fully_shard(moe.experts, mesh=self.mesh["data"], shard_placement_fn=lambda _: Shard(1))
            # A block returns its routing inside a dataclass, where FSDP finds no tensors, and that is wanted: the
            # gradients of the routing losses come before all others and would gather the weights of all blocks at once.
            fully_shard(block, mesh=self.everyone)
        fully_shard(model, mesh=self.everyone)
        # Keys and values that a block returns are views; nobody writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return model

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.first:
            return None
        single = LanguageModel(model.config)
        single.load_state_dict(weights)
        return single.to(self.device)

    def own_rows(self, batches: TokenBatches) -> OwnRows:
        return OwnRows(batches, self.rank, self.n)

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values / self.n

    def agreed(self, signal: int | None) -> int | None:
        highest = torch.tensor(signal or 0, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        return int(highest) or None

    def count_together(self, routers: list[Router]) -> None:
        count_over_processes(routers, self.group)

    def metrics(self, folder: Path, step: int) -> MetricsFile:
        return MetricsFile(folder, step) if self.first else NoMetrics()

    def exclusive(self, folder: Path) -> contextlib.AbstractContextManager[None]:
        return locked(folder) if self.first else contextlib.nullcontext()

    def from_first(self, make: Callable[[], Made]) -> Made:
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except (Exception, Interrupted) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.patient)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def restore(
        self, run: Run, model: LanguageModel, optimizer: torch.optim.AdamW, average: WeightAverage
    ) -> checkpoint.Checkpoint | None:
        """As for one process, from a checkpoint of any number of processes.

        Its index is unpickled, see the top of this file.
        """

        def newest() -> checkpoint.Checkpoint | None:
            if (found := checkpoint.newest(run.checkpoints, continuable(run))) is not None:
                checkpoint.refuse_other_identity(found, run.identity)
                if not (found.path / SHARDS).is_dir():
                    raise checkpoint.CheckpointMismatchError(
                        f"{found.path} was not written by `python -m staged_training parallel`"
                    )
                checkpoint.drop_others(run.checkpoints, found.step)
            return found

        if (saved := self.from_first(newest)) is not None:
            state = _state(model, optimizer, average)
            load_shards(state, checkpoint_id=saved.path / SHARDS, process_group=self.group)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return saved

    def save(
        self,
        run: Run,
        step: int,
        model: LanguageModel,
        optimizer: torch.optim.AdamW,
        average: WeightAverage,
        *,
        state: dict[str, Any],
    ) -> Path:
        assert run.boundary == 0, "branches are trained by one process"
        # Weights, the optimizer's two moments, and what is averaged.
        copies = 4 if average.sums else 3
        n_bytes = copies * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        temporary = self.from_first(lambda: checkpoint.begin(run.checkpoints, step, n_bytes=n_bytes))
        shards = _state(model, optimizer, average)
        with checkpoint.writing(temporary):
            try:
                save_shards(shards, checkpoint_id=temporary / SHARDS, process_group=self.group)
            except CheckpointException as error:
                # Raised on all processes, with what went wrong on each. Torch's own writer of files knows no OSError.
                for failure, _ in error.failures.values():
                    if isinstance(failure, OSError) or "inline_container" in str(failure):
                        raise OSError(str(failure)) from error
                raise

        def seal() -> Path:
            with checkpoint.writing(temporary):
                write_json(temporary / checkpoint.STATE, {"step": step, "identity": run.identity, **state})
                files = [str(path.relative_to(temporary)) for path in sorted(temporary.rglob("*")) if path.is_file()]
                return checkpoint.seal(temporary, step, files)

        return self.from_first(seal)


def _state(model: LanguageModel, optimizer: torch.optim.AdamW, average: WeightAverage) -> dict[str, Any]:
    """What a checkpoint holds, in the processes' own memory where it is tensors."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, **({"merged": average.sums} if average.sums else {})}


def _refuse(config: ModelConfig, n_data: int, n_expert: int) -> None:
    """Raises ValueError, naming what does not fit the mesh."""
    for name, moe in {f"blocks[{layer}].moe": config.block(layer).moe for layer in range(config.n_layers)}.items():
        if moe.n_experts % n_expert:
            raise ValueError(
                f"{name}.n_experts: {moe.n_experts} cannot be divided evenly over expert_parallel = {n_expert}"
                " processes"
            )
        if n_expert > 1 and math.gcd(config.d_model, moe.d_expert) % n_data:
            widths = f"d_model: {config.d_model} and {name}.d_expert: {moe.d_expert}"
            raise ValueError(f"{widths} must both divide by the {n_data} processes that share the weights of an expert")
        policy = moe.router.policy
        if policy.needs_whole_batch or policy.own_statistics:
            raise ValueError(
                f"{type(policy).__name__} ranks the tokens of a whole batch against each other, of which every process"
                " sees a part only"
            )


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes of torchrun (NCCL on GPUs, gloo otherwise), or starts a group of one without it. Yields this
    process's device."""
    on_gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"]) if under_torchrun() else 0
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    if under_torchrun():
        dist.init_process_group(backend)
    else:
        # A store in memory: a run of one process needs no port.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()
