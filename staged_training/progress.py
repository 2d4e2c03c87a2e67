"""What a training run reports: one line per interval for people and grep, every step as JSON, and the same numbers to a
tracker on request.

`metrics.jsonl` holds what is a function of the configuration alone: an interrupted and resumed run leaves the same
bytes as an uninterrupted one. So does `diagnostics.jsonl`, what the routers did in every step that ends an interval
(see `staged_training.diagnostics`). What differs from run to run (seconds, tokens per second) lies beside them in
`timing.jsonl`.

A run under way appends to these files, and each of its checkpoints holds their checksums up to its step. A run
continues from a checkpoint only where they are as it knows them: no step is missing from a curve and none was changed.
"""

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import IO, Any

from foundation.files import CorruptFileError, fingerprint, fsync, naming, read_json_lines, write_text

METRICS, DIAGNOSTICS, TIMING = "metrics.jsonl", "diagnostics.jsonl", "timing.jsonl"
LOGS = (METRICS, DIAGNOSTICS, TIMING)
TRACKERS = ("none", "wandb")


class MetricsFile:
    """Append-only `metrics.jsonl` and `timing.jsonl` of a run, one line per step, and `diagnostics.jsonl`, one line per
    interval."""

    def __init__(self, folder: Path, step: int) -> None:
        """Cuts the files back to `step`, so that the steps after a checkpoint are written once."""
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._sums = {name: hashlib.sha256() for name in LOGS}
        for name in LOGS:
            cut_back(folder / name, step)
            self._sums[name].update((folder / name).read_bytes() if (folder / name).exists() else b"")
            self._files[name] = open(folder / name, "ab")  # noqa: SIM115

    def write(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """One step."""
        self._append(METRICS, metrics)
        self._append(TIMING, timing)

    def write_diagnostics(self, diagnostics: dict[str, Any]) -> None:
        """One step that ends an interval."""
        self._append(DIAGNOSTICS, diagnostics)

    def _append(self, name: str, content: dict[str, Any]) -> None:
        line = f"{json.dumps(content)}\n".encode()
        with self._naming(name):
            self._files[name].write(line)
        self._sums[name].update(line)

    def flush(self) -> dict[str, str]:
        """To the disk: called before a checkpoint, which must never be ahead of its metrics.

        Returns:
            the SHA-256 of each file as it was written, for `problem_of_logs`.
        """
        for name, file in self._files.items():
            with self._naming(name):
                file.flush()
                fsync(file.fileno(), self._folder / name)
        return {name: total.hexdigest() for name, total in self._sums.items()}

    def _naming(self, name: str) -> contextlib.AbstractContextManager[None]:
        return naming(self._folder / name, "the same command continues behind the last checkpoint")

    def close(self) -> None:
        self.flush()
        for file in self._files.values():
            file.close()


class NoMetrics(MetricsFile):
    """Writes nothing: of several processes that train together one writes."""

    def __init__(self) -> None:
        pass

    def write(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        pass

    def write_diagnostics(self, diagnostics: dict[str, Any]) -> None:
        pass

    def flush(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        pass


def cut_back(path: Path, step: int) -> None:
    """Drops lines of later steps and a torn last line."""
    if not path.exists():
        return
    write_text(path, _lines_up_to(path, step).decode())


def _lines_up_to(path: Path, step: int) -> bytes:
    """The lines of steps up to `step`; without a torn last one."""
    if not path.exists():
        return b""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if line.endswith(b"\n") and _step_of(line) <= step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: of step 1, step 2, ...; see `read_steps`."""
    return read_steps(folder / METRICS)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that has one for every step.

    Raises:
        CorruptFileError: naming the first step that is not where it belongs: a curve would be shifted.
    """
    if not path.exists():
        raise CorruptFileError(f"{path} is missing")
    lines = read_json_lines(path)
    for number, line in enumerate(lines, 1):
        if (step := line.get("step") if isinstance(line, dict) else None) != number:
            raise CorruptFileError(f"{path}:{number} is of step {step}: lines are missing or were changed")
    return lines


def problem_of_logs(folder: Path, step: int, sums: dict[str, str]) -> str | None:
    """Why a run cannot continue from a checkpoint at `step`: what its files miss or say otherwise up to there.

    Args:
        sums: what `MetricsFile.flush` returned then; empty in checkpoints from before they held it, for which only
            the number of lines is looked at.
    """
    for name in LOGS:
        before = _lines_up_to(folder / name, step)
        if name in sums and hashlib.sha256(before).hexdigest() != sums[name]:
            return f"{name} is not as it was at step {step}"
        if name != DIAGNOSTICS and (n_lines := len(before.splitlines())) != step:
            return f"{name} holds {n_lines} of the {step} steps before it"
    return None


class Progress:
    """Prints and tracks. Averages over the interval, so that a line means more than the step it is printed at.

    Args:
        label: begins every line.
        every: steps between lines.
        bytes_per_token: of the training text, to show the loss in bits per byte.
    """

    def __init__(
        self,
        label: str,
        *,
        n_steps: int,
        every: int,
        tokens_per_step: int,
        bytes_per_token: float,
        tracker: "Tracker | None" = None,
    ) -> None:
        self.label, self.n_steps, self.every = label, n_steps, every
        self.tokens_per_step, self.bytes_per_token, self.tracker = tokens_per_step, bytes_per_token, tracker
        self._since: list[dict[str, float]] = []
        self._began = time.perf_counter()

    def ends_interval(self, step: int) -> bool:
        """Whether a line is printed behind this step; the last one always ends an interval."""
        return step % self.every == 0 or step == self.n_steps

    def step(self, metrics: dict[str, Any]) -> None:
        """Takes the metrics of the step that was just done."""
        self._since.append(metrics)
        step = metrics["step"]
        if not self.ends_interval(step):
            return
        seconds, count = max(time.perf_counter() - self._began, 1e-9), len(self._since)
        loss = sum(record["loss"] for record in self._since) / count
        values = {
            "step": step,
            "loss": loss,
            "bpb": loss / math.log(2) / self.bytes_per_token,
            "grad_norm": metrics["grad_norm"],
            "tok/s": count * self.tokens_per_step / seconds,
            "mean_experts": sum(record["mean_experts"] for record in self._since) / count,
            "lr": metrics["lr"],
            "eta": (self.n_steps - step) * seconds / count,
        }
        print(self.line(values), flush=True)
        if self.tracker is not None:
            self.tracker.log(values)
        self._since.clear()
        self._began = time.perf_counter()

    def line(self, values: dict[str, float]) -> str:
        return (
            f"{self.label} step={values['step']:.0f}/{self.n_steps} loss={values['loss']:.4f} bpb={values['bpb']:.4f}"
            f" grad_norm={values['grad_norm']:.3f} tok/s={values['tok/s']:.0f}"
            f" mean_experts={values['mean_experts']:.2f} lr={values['lr']:.3e} eta={values['eta']:.0f}s"
        )


class Tracker:
    """The progress lines' numbers sent to Weights & Biases. WANDB_MODE=offline writes them to the run folder and needs
    no account.

    Raises:
        ValueError: for an unknown tracker, or when its library is not installed or cannot begin: without a key and a
            terminal to ask for one, say.
    """

    def __init__(self, name: str, folder: Path, label: str, config: dict[str, Any]) -> None:
        if name not in TRACKERS[1:]:
            raise ValueError(f"--track {name!r} is not known; legal: {', '.join(TRACKERS)}")
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"--track wandb needs the wandb package ({error}): install the 'track' extra, or leave the option out"
            ) from error
        # A run that is continued is the same run there too.
        identity = fingerprint([str(folder.resolve()), config])[:16]
        try:
            self._run = wandb.init(
                project="hybrid-moe-lab", name=label, dir=str(folder), config=config, id=identity, resume="allow"
            )
        except wandb.Error as error:
            raise ValueError(f"--track wandb: {error}. WANDB_MODE=offline needs no account") from error

    def log(self, values: dict[str, float]) -> None:
        self._run.log({key: value for key, value in values.items() if key != "step"}, step=int(values["step"]))

    def close(self) -> None:
        self._run.finish()


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf
