"""What a training run reports: one line per interval for people and grep, every step as JSON, and the same numbers to a
tracker on request.

`metrics.jsonl` holds what is a function of the configuration alone: an interrupted and resumed run leaves the same
bytes as an uninterrupted one. So does `diagnostics.jsonl`, what the routers did in every step that ends an interval
(see `staged_training.diagnostics`). What differs from run to run (seconds, tokens per second) lies beside them in
`timing.jsonl`.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from foundation.files import fingerprint, write_text

METRICS, DIAGNOSTICS, TIMING = "metrics.jsonl", "diagnostics.jsonl", "timing.jsonl"
TRACKERS = ("none", "wandb")


class MetricsFile:
    """Append-only `metrics.jsonl` and `timing.jsonl` of a run, one line per step, and `diagnostics.jsonl`, one line per
    interval."""

    def __init__(self, folder: Path, step: int) -> None:
        """Cuts the files back to `step`, so that the steps after a checkpoint are written once."""
        for name in (METRICS, DIAGNOSTICS, TIMING):
            cut_back(folder / name, step)
        self._metrics: IO[str] = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._diagnostics: IO[str] = open(folder / DIAGNOSTICS, "a", encoding="utf-8")  # noqa: SIM115
        self._timing: IO[str] = open(folder / TIMING, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """One step."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._timing.write(json.dumps(timing) + "\n")

    def write_diagnostics(self, diagnostics: dict[str, Any]) -> None:
        """One step that ends an interval."""
        self._diagnostics.write(json.dumps(diagnostics) + "\n")

    def flush(self) -> None:
        """To the disk: called before a checkpoint, which must never be ahead of its metrics."""
        for file in (self._metrics, self._diagnostics, self._timing):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()
        for file in (self._metrics, self._diagnostics, self._timing):
            file.close()


class NoMetrics(MetricsFile):
    """Writes nothing: of several processes that train together one writes."""

    def __init__(self) -> None:
        pass

    def write(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        pass

    def write_diagnostics(self, diagnostics: dict[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def cut_back(path: Path, step: int) -> None:
    """Drops lines of later steps and a torn last line."""
    if not path.exists():
        return
    kept = [
        line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and _step_of(line) <= step
    ]
    write_text(path, "".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, one per step."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


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


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
