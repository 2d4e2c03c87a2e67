"""Training runs for test_parallel.py: `parallel_worker.py FOLDER RANK WORLD_SIZE N_EXPERT JOB...`, a job being
POLICY/NAME or `stop:POLICY/NAME`.

Runs each job in FOLDER/POLICY/NAME, continuing whatever lies there, and leaves the whole model's state beside it as
NAME.pt.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from attention.config import AttentionConfig
from foundation.stopping import Interrupted
from lm.config import ModelConfig
from lm.model import LanguageModel
from moe.config import MoEConfig
from routing.losses import ThreeLevelBalance
from routing.policies.null_experts import NullExperts
from routing.policies.relu import ReLU
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from routing.router import RouterConfig
from staged_training.data import Batches, TokenBatches
from staged_training.loop import train_stage
from staged_training.many_processes import ManyProcesses
from staged_training.optimizer import OptimizerConfig
from staged_training.processes import ALONE, Processes
from staged_training.progress import Progress
from staged_training.run import Run
from staged_training.schedule import Schedule, Stage

LEVELS = ThreeLevelBalance(
    n_groups=2, n_partitions=2, expert_coefficient=1e-2, group_coefficient=1e-2, partition_coefficient=1e-2
)
ROUTERS = {
    "top_k": RouterConfig(policy=TopK(k=2), score="sigmoid", selection_bias_step=1e-2, three_level_balance=LEVELS),
    # Targets that no process meets with its own tokens alone.
    "top_p": RouterConfig(policy=TopP(target_mean=2.3, cap=5, entropy_coefficient=1e-2)),
    "null_experts": RouterConfig(policy=NullExperts(k=4, n_null=6, target_mean=2.3)),
    "relu": RouterConfig(
        policy=ReLU(target_mean=3.0, cap=6, control="penalty", l1_coefficient=1e-3), renormalise=False
    ),
}
# The same routing under the other optimizer, with weights merged over steps on both sides of a checkpoint.
ROUTERS["muon"] = ROUTERS["top_k"]
STEPS, SAVE_EVERY, STOP_AT, BATCH, LENGTH = 6, 3, 4, 8, 12


def model_of(policy: str) -> LanguageModel:
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8, window=4)
    moe = MoEConfig(n_experts=8, d_expert=16, d_shared=8, router=ROUTERS[policy])
    config = ModelConfig(vocab_size=30, d_model=16, n_layers=2, layer_plan="SF", attention=attention, moe=moe)
    model = LanguageModel(config).init_weights(0)
    # A head of zeros would let nothing through in the first step.
    torch.nn.init.normal_(model.head_VD, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


class Stopping:
    """Batches that send SIGTERM to this process when it reads the one of step STOP_AT."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.reads = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int):
        self.reads += 1
        if self.reads == STOP_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.batches[index]


def train(policy: str, folder: Path, processes: Processes = ALONE, *, stop: bool = False) -> LanguageModel | None:
    """Trains for STEPS steps; returns the whole model on the first process."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, 30, STEPS * BATCH * LENGTH + 1) // 2
    batches, model = TokenBatches(tokens, batch_size=BATCH, seq_len=LENGTH), model_of(policy)
    rows, part = processes.own_rows(batches, BATCH), processes.shard(model, torch.device("cpu"))
    if stop and isinstance(processes, ManyProcesses) and processes.rank == processes.n - 1:
        rows = Stopping(rows)
    schedule = Schedule(peak=3e-3, warmup_steps=2, decay_steps=2)
    if policy == "muon":
        schedule = Schedule(peak=3e-3, warmup_steps=2, decay_steps=4, anneal="merge")
    run = Run(
        label=policy,
        method="trunk",
        branch_seed=None,
        stage=Stage(n_batches=STEPS, schedule=schedule),
        # A gradient that is nearly zero must not become a full step of either sign: rounding would decide.
        optimizer=OptimizerConfig(kind="muon" if policy == "muon" else "adamw", embedding_rate=1.0, eps=1e-3, clip=0.1),
        seed=0,
        boundary=0,
        order=tuple(range(STEPS)),
        identity={"policy": policy},
        folder=folder,
    )
    progress = Progress(policy, n_steps=STEPS, every=SAVE_EVERY, tokens_per_step=BATCH * LENGTH, bytes_per_token=1.0)
    train_stage(run, part, rows, save_every=SAVE_EVERY, progress=progress, processes=processes)
    return processes.whole(part)


def main(folder: Path, rank: int, world_size: int, n_expert: int, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store_{world_size}_{n_expert}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    processes = ManyProcesses(n_expert, torch.device("cpu"))
    for job in jobs:
        stop, _, place = job.rpartition(":")
        try:
            whole = train(place.split("/")[0], folder / place, processes, stop=bool(stop))
        except Interrupted as stopped:
            (folder / f"{place}.exit_code_of_{rank}").write_text(str(stopped.exit_code))
            continue
        if whole is not None:
            torch.save(whole.state_dict(), folder / f"{place}.pt")
    dist.destroy_process_group()
    # A thread of torch's that still wants the interpreter while it is taken down aborts the process, once in a while;
    # all results are written.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
