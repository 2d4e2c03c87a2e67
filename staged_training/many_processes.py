"""Training in several processes: data parallel over the rows of a batch, expert parallel over the experts, FSDP2 for
all other weights.

The processes form a mesh of data x expert. Every process has rows of its own in each batch. Experts are spread over the
expert dimension (`moe.expert_parallel`) and cut once more over the data dimension; all other weights are cut over all
processes and gathered block by block as they are needed (FSDP2). Gradients are means over processes, so they are those
of one process with the whole batch. torch.distributed does all of it: DeviceMesh, DTensor, fully_shard, and distributed
checkpoints, which any number of processes can load.

What processes of one run send each other (`from_first`) travels as a pickle, and so does the index of their
checkpoints (`staged_training.shards`).

Legend: B batch, T tokens, D model width, N targets.
"""

import contextlib
import datetime
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
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
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from foundation.environment import under_torchrun
from foundation.files import write_json
from foundation.stopping import Interrupted
from lm.block import Block
from lm.config import ModelConfig
from lm.evaluate import Share
from lm.model import LanguageModel
from moe.expert_parallel import ExpertParallelExperts
from moe.experts import Experts
from routing.over_processes import count_over_processes
from routing.router import Router
from staged_training import checkpoint
from staged_training.checkpoint import SHARDS
from staged_training.data import Batches, OwnRows, own_rows
from staged_training.launch import LEFT_ALONE
from staged_training.merging import WeightAverage
from staged_training.processes import Made, Processes, continuable
from staged_training.progress import MetricsFile, NoMetrics
from staged_training.record import locked
from staged_training.run import Run
from staged_training.shards import MERGED, MODEL, OPTIMIZER, fill

# Of processes that wait for the first.
PATIENCE = datetime.timedelta(days=7)
# What the backends say of a process that is there no more.
CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


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

    def place(self, device: torch.device) -> torch.device:
        return self.device

    def check(self, model: ModelConfig, batch_size: int) -> None:
        own_rows(batch_size, self.rank, self.n)
        _refuse(model, *self.mesh.shape)

    def shard(self, model: LanguageModel, device: torch.device) -> LanguageModel:
        """Cuts the weights of a whole model, the same in all processes, in place; what is cut moves to the device block
        by block.

        Raises:
            ValueError: for sizes that cannot be divided, and for a routing policy that needs to see the whole batch.
        """
        n_data, n_expert = self.mesh.shape
        _refuse(model.config, n_data, n_expert)
        for block in model.blocks:
            if n_expert > 1:
                moe = cast(Block, block).moe
                assert isinstance(moe.experts, Experts), "weights in few bits are not trained"
                moe.experts = ExpertParallelExperts(moe.experts, self.mesh["expert"])
                # Not over the dimension that expert parallelism has cut already: rows of experts would lie interleaved.
                fully_shard(moe.experts, mesh=self.mesh["data"], shard_placement_fn=lambda _: Shard(1))
            # A block returns its routing inside a dataclass, where FSDP finds no tensors, and that is wanted: the
            # gradients of the routing losses come before all others and would gather the weights of all blocks at once.
            fully_shard(block, mesh=self.everyone)
        fully_shard(model, mesh=self.everyone)
        # What is run of a model beside the whole of it: the root's weights are gathered there too.
        register_fsdp_forward_method(model, "prefix")
        register_fsdp_forward_method(model, "above")
        # Keys and values that a block returns are views; nobody writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return model.to(device)

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        """On the CPU: a model that is cut may be too large for one device."""
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.first:
            return None
        single = LanguageModel(model.config)
        single.load_state_dict(weights)
        return single

    def own_rows(self, batches: Batches, batch_size: int) -> OwnRows:
        return OwnRows(batches, own_rows(batch_size, self.rank, self.n))

    def rows_of(self, whole_BT: Tensor) -> Tensor:
        return whole_BT[own_rows(len(whole_BT), self.rank, self.n)]

    def all_rows(self, x_BTD: Tensor) -> Tensor:
        parts = [torch.empty_like(x_BTD) for _ in range(self.n)]
        dist.all_gather(parts, x_BTD.contiguous(), group=self.group)
        return torch.cat(parts)

    def share(self, batch_size: int, seq_len: int) -> Share:
        return _ShareOfRows(self, batch_size, seq_len)

    def align(self, model: LanguageModel) -> None:
        for router in model.routers():
            for buffer in router.policy.buffers():
                dist.broadcast(buffer, src=0, group=self.group)
        # A forward without a backward leaves the root's weights gathered, and an optimizer would be given those.
        cast(FSDPModule, model).reshard()

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

    @contextlib.contextmanager
    def exclusive(self, folder: Path, *, wait: bool = False) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            # Where the first is refused, so are all.
            self.from_first(lambda: held.enter_context(locked(folder, wait=wait)))
            yield

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
        """As for one process, from a checkpoint of any number of processes."""

        def newest() -> checkpoint.Checkpoint | None:
            if (found := checkpoint.newest(run.checkpoints, continuable(run))) is not None:
                checkpoint.refuse_other_identity(found, run.identity)
                checkpoint.drop_others(run.checkpoints, found.step)
            return found

        if (saved := self.from_first(newest)) is not None:
            state = _state(model, optimizer, average)
            if (saved.path / SHARDS).is_dir():
                load_shards(state, checkpoint_id=saved.path / SHARDS, process_group=self.group)
            else:
                whole = checkpoint.with_tensors(saved)
                fill(state, whole.weights, whole.optimizer)
            set_state_dict(model, optimizer, model_state_dict=state[MODEL], optim_state_dict=state[OPTIMIZER])
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
    return {MODEL: weights, OPTIMIZER: moments, **({MERGED: average.sums} if average.sums else {})}


class _ShareOfRows(Share):
    def __init__(self, processes: ManyProcesses, batch_size: int, seq_len: int) -> None:
        self.processes, self.batch_size, self.seq_len = processes, batch_size, seq_len

    def own(self, of_target_N: np.ndarray) -> np.ndarray:
        rows = own_rows(self.batch_size, self.processes.rank, self.processes.n)
        row_N = np.arange(len(of_target_N)) // self.seq_len % self.batch_size
        return of_target_N[(row_N >= rows.start) & (row_N < rows.stop)]

    def sums(self, values: Tensor) -> Tensor:
        values = values.to(self.processes.device)
        dist.all_reduce(values, group=self.processes.group)
        return values.cpu()


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
    process's device.

    Where another process has ended, this one ends too, without a word: why, that one says.
    """
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
    except (RuntimeError, CheckpointException) as error:
        if not _left_alone(error):
            raise
        # At once: torch would warn of what was on its way to the other.
        sys.stdout.flush()
        os._exit(LEFT_ALONE)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(n_expert: int) -> Iterator[ManyProcesses]:
    """Joins the processes of torchrun; of their output only the first's is shown.

    Args:
        n_expert: see `ManyProcesses`.
    """
    with process_group() as device, contextlib.ExitStack() as cleanup:
        processes = ManyProcesses(n_expert, device)
        if not processes.first:
            cleanup.enter_context(contextlib.redirect_stdout(cleanup.enter_context(open(os.devnull, "w"))))
        yield processes


def _left_alone(error: BaseException) -> bool:
    """Whether a process that was waited for has ended."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in CLOSED)
