import dataclasses
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foundation.stopping import Interrupted
from lm.model import LanguageModel
from moe.backends import choose_backend
from routing.policies.random_k import RandomK
from staged_training import checkpoint
from staged_training.data import TokenBatches
from staged_training.loop import NonFiniteLossError, train_stage
from staged_training.optimizer import OptimizerConfig
from staged_training.progress import DIAGNOSTICS, METRICS, TIMING, Progress
from staged_training.run import Run
from staged_training.schedule import Schedule, Stage

STEPS = 12
STAGE = Stage(n_batches=STEPS, schedule=Schedule(peak=1e-2, warmup_steps=2, decay_steps=4))


class Watched:
    """Token batches that do something when a certain step reads its batch."""

    def __init__(self, batches, at, act):
        self.batches, self.at, self.act, self.reads = batches, at, act, 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        self.reads += 1
        inputs, targets_BT = self.batches[index]
        if self.reads == self.at:
            self.act()
        return inputs, targets_BT


@pytest.fixture(scope="module")
def batches(corpus):
    return TokenBatches(corpus.train.tokens, batch_size=2, seq_len=16)


@pytest.fixture(scope="module")
def train(batches, with_policy):
    """Trains a random-k model, whose every step draws, into a folder; the same call continues."""

    def run(folder, *, batches=batches, stage=STAGE, seed=0, prepare=None):
        model = LanguageModel(with_policy(RandomK(k_min=1, k_max=4, k_eval=2))).init_weights(0)
        if prepare is not None:
            prepare(model)
        folder.mkdir(exist_ok=True)
        progress = Progress("test", n_steps=STEPS, every=4, tokens_per_step=32, bytes_per_token=2.0)
        stage_run = Run(
            label="test",
            method="trunk",
            branch_seed=None,
            stage=stage,
            optimizer=OptimizerConfig(kind="adamw", embedding_rate=1.0),
            seed=seed,
            boundary=0,
            order=tuple(range(STEPS)),
            identity={"stage": dataclasses.asdict(stage), "seed": seed},
            folder=folder,
        )
        return train_stage(stage_run, model, batches, save_every=3, progress=progress)

    return run


def contents(folder):
    """Everything a finished stage leaves that must not depend on interruptions."""
    last = folder / "checkpoints" / f"step_{STEPS:08d}"
    files = [last / checkpoint.WEIGHTS, last / checkpoint.OPTIMIZER, folder / METRICS, folder / DIAGNOSTICS]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """What a stage leaves that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(folder)
    return contents(folder)


def test_learns_and_reports_every_step(train, tmp_path, capsys):
    result = train(tmp_path)
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["lr"] for record in records] == [STAGE.schedule.value(step, STEPS) for step in range(STEPS)]
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
    assert all(1 <= mean <= 4 for mean in result.mean_experts)
    # Random k: the mean over the steps of what each step drew.
    assert np.mean(result.mean_experts) == pytest.approx(np.mean([record["mean_experts"] for record in records]))
    assert len({record["mean_experts"] for record in records}) > 1
    printed = capsys.readouterr().out
    assert printed.count("test step=") == 3
    chosen = choose_backend(torch.zeros(1, 8), torch.zeros(1, 8, 8))
    assert "test: experts computed by {} ({})".format(*chosen) in printed
    assert (result.steps, result.checkpoint.name, result.skipped) == (STEPS, "step_00000012", ())


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        *((signal.SIGTERM, at) for at in (1, 5, STEPS)),
        *((signal.SIGINT, 5), (signal.SIGHUP, 1), (signal.SIGUSR1, STEPS)),
    ],
)
def test_a_stop_signal_saves_and_the_same_call_continues_bit_for_bit(train, batches, straight, tmp_path, stop, at):
    before = signal.getsignal(stop)
    with pytest.raises(Interrupted, match=f"saved at step {at} of {STEPS}.*the same command continues") as stopped:
        train(tmp_path / "stopped", batches=Watched(batches, at, lambda: os.kill(os.getpid(), stop)))
    assert stopped.value.exit_code == 128 + stop
    assert signal.getsignal(stop) is before
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{at:08d}").is_dir()
    train(tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == straight


def test_a_corrupt_checkpoint_is_named_and_costs_steps_but_no_bit(train, batches, straight, tmp_path, caplog):
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", batches=Watched(batches, 8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    victim = tmp_path / "stopped" / "checkpoints" / "step_00000008" / checkpoint.WEIGHTS
    data = bytearray(victim.read_bytes())
    data[-3] ^= 4
    victim.write_bytes(data)
    result = train(tmp_path / "stopped")
    assert "step_00000008: weights.safetensors does not match its checksum" in result.skipped[0]
    assert "step_00000008" in caplog.text
    assert contents(tmp_path / "stopped") == straight


def forget(path):
    path.unlink()


def change_a_digit(path):
    text = path.read_text()
    place = text.index('"loss": ') + 9 if '"loss": ' in text else text.index('"seconds": ') + 13
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10 if text[place].isdigit() else 1}{text[place + 1 :]}")


def lose_step_5(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] != 5))


@pytest.mark.parametrize(
    ("name", "harm", "continues_at"),
    [
        (METRICS, forget, None),
        (TIMING, forget, None),
        (METRICS, change_a_digit, None),
        (TIMING, change_a_digit, None),
        (METRICS, lose_step_5, 3),
    ],
)
def test_steps_that_the_metrics_lost_are_trained_again(
    train, batches, straight, tmp_path, caplog, capsys, name, harm, continues_at
):
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", batches=Watched(batches, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    harm(tmp_path / "stopped" / name)
    capsys.readouterr()
    train(tmp_path / "stopped")
    # A curve without its first steps would look like one that begins later.
    assert f"step_00000005: {name}" in caplog.text
    printed = capsys.readouterr().out
    assert (f"continues at step {continues_at} of" in printed) == (continues_at is not None)
    assert contents(tmp_path / "stopped") == straight


def test_nothing_depends_on_global_random_states_or_moves_them(train, batches, tmp_path):
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    train(tmp_path / "straight")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]  # noqa: NPY002

    class Scrambled:
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            torch.manual_seed(100 + index)
            random.seed(100 + index)
            np.random.seed(100 + index)  # noqa: NPY002
            return batches[index]

    train(tmp_path / "scrambled", batches=Scrambled())
    assert contents(tmp_path / "scrambled") == contents(tmp_path / "straight")
    last = [tmp_path / name / "checkpoints" / f"step_{STEPS:08d}" for name in ("scrambled", "straight")]
    assert sorted(path.name for path in last[0].iterdir()) == sorted([*checkpoint.FILES, checkpoint.MANIFEST])
    scrambled, straight = (checkpoint.read_state(folder) for folder in last)
    for state in (scrambled, straight):
        # Measured seconds, and the checksum of the file that holds them.
        del state["seconds"], state["logs"][TIMING]
    assert scrambled == straight


def poison(model):
    with torch.no_grad():
        model.head_VD[5, 5] = torch.nan


def test_a_loss_that_is_not_finite_stops_with_its_place(train, batches, straight, tmp_path):
    models = []
    watched = Watched(batches, 8, lambda: poison(models[0]))
    with pytest.raises(
        NonFiniteLossError,
        match=r"loss nan.* at step 7, data position 7, batch 7; last good checkpoint: .*step_00000006",
    ):
        train(tmp_path, batches=watched, prepare=models.append)
    saved = checkpoint.load_latest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.step == 6
    assert all(torch.isfinite(tensor).all() for tensor in saved.weights.values())
    assert len((tmp_path / METRICS).read_text().splitlines()) == 7
    # Nothing is lost: without the disturbance the same call ends where an undisturbed run ends.
    train(tmp_path)
    assert contents(tmp_path) == straight


def test_scores_that_are_not_finite_stop_with_their_place_too(train, batches, tmp_path):
    def poison_router(model):
        with torch.no_grad():
            model.blocks[1].moe.router.weight_ED.fill_(torch.inf)

    with pytest.raises(
        NonFiniteLossError, match=r"router of layer 1.*at step 0, data position 0, batch 0; last good checkpoint: None"
    ):
        train(tmp_path, prepare=poison_router)


def test_an_error_of_the_same_words_is_not_taken_for_a_diverged_router(train, tmp_path):
    def refuse(model):
        def hook(*_):
            raise ValueError("the answer is not finite")

        model.blocks[1].register_forward_pre_hook(hook)

    with pytest.raises(ValueError, match=r"^the answer is not finite$"):
        train(tmp_path, prepare=refuse)


def test_an_infinite_gradient_stops_before_the_weights_change(train, batches, tmp_path):
    models = []

    def prepare(model):
        model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
        models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        models.append(model)

    with pytest.raises(NonFiniteLossError, match=r"gradient norm (inf|nan) at step 0"):
        train(tmp_path, prepare=prepare)
    before, model = models
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize(
    "change",
    [{"stage": dataclasses.replace(STAGE, schedule=Schedule(peak=1e-2, warmup_steps=2, decay_steps=5))}, {"seed": 1}],
)
def test_a_checkpoint_of_another_stage_is_refused(train, tmp_path, change):
    train(tmp_path)
    with pytest.raises(
        checkpoint.CheckpointMismatchError, match=r"decay_steps: stored 4, asked 5|seed: stored 0, asked 1"
    ):
        train(tmp_path, **change)


class Remembering:
    """Token batches that keep the weights as they are when each step reads its batch."""

    def __init__(self, batches):
        self.batches, self.weights = batches, []

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        self.weights.append({name: tensor.double() for name, tensor in checkpoint.model_tensors(self.model).items()})
        return self.batches[index]

    def watch(self, model):
        self.model = model


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_merged_weights_are_the_average_of_those_after_each_update(train, batches, tmp_path, shape):
    plain = Schedule(peak=1e-2, warmup_steps=2)
    merging = Schedule(peak=1e-2, warmup_steps=2, decay_steps=4, decay_shape=shape, anneal="merge")
    seen = Remembering(batches)
    straight = train(tmp_path / "plain", batches=seen, stage=Stage(n_batches=STEPS, schedule=plain), prepare=seen.watch)
    merged = train(tmp_path / "merged", stage=Stage(n_batches=STEPS, schedule=merging))
    last, got = (load_file(result.checkpoint / checkpoint.WEIGHTS) for result in (straight, merged))
    # Those after 9, 10, 11 and 12 updates.
    window = [*seen.weights[STEPS - 3 :], {name: tensor.double() for name, tensor in last.items()}]
    t = np.linspace(0, 1, 5)
    shares = np.diff(t if shape == "linear" else np.sqrt(t))
    parameters = dict(seen.model.named_parameters())
    for name, tensor in got.items():
        if name in parameters:
            average = torch.stack([share * weights[name] for share, weights in zip(shares, window)]).sum(0)
            torch.testing.assert_close(tensor, average.float(), atol=1e-7, rtol=1e-5)
            assert not torch.equal(tensor, last[name]), name
        else:
            # Selection biases and loads: as the last step left them.
            assert torch.equal(tensor, last[name]), name
    assert (tmp_path / "merged" / METRICS).read_bytes() == (tmp_path / "plain" / METRICS).read_bytes()


@pytest.mark.parametrize("at", [5, 10, STEPS])
def test_a_merge_that_was_stopped_goes_on_bit_for_bit(train, batches, tmp_path, at):
    merging = Schedule(peak=1e-2, warmup_steps=2, decay_steps=4, anneal="merge")
    stage = Stage(n_batches=STEPS, schedule=merging)
    train(tmp_path / "straight", stage=stage)
    watched = Watched(batches, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", batches=watched, stage=stage)
    train(tmp_path / "stopped", stage=stage)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
