"""`python -m tests.soak.sabotage`: victims that are broken on purpose, one for each attack, and what the attack says of
them. An attack that finds nothing here would find nothing anywhere.

Victims are broken in this process, and what is forked from it inherits that.
"""

# First: it sets the environment, ahead of all that imports torch.
from tests.soak.__main__ import CASES  # isort: skip

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import corpus.__main__ as corpus_command
from foundation import files
from staged_training import checkpoint
from tests.soak.world import World
from triton_kernels.linear import linear_attention_torch

load_file, decayed = checkpoint.load_file, linear_attention_torch.decayed_linear_attention_torch


def optimizer_forgotten(path: Path) -> dict[str, Tensor]:
    """A run that continues without its optimizer's state."""
    tensors = load_file(path)
    return {name: torch.zeros_like(x) for name, x in tensors.items()} if path.name == checkpoint.OPTIMIZER else tensors


def checksums_ignored(*_: Any) -> None:
    """A reader that takes what it finds."""


@contextlib.contextmanager
def full_disk_unanswered(path: Path, otherwise: str) -> Iterator[None]:
    """A writer that has nothing to say of it."""
    try:
        yield
    except OSError as error:
        raise RuntimeError("not expected") from error


def wrong_factor(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """An operation that is off by a thousandth."""
    o, state = decayed(*tensors, **options)  # pyright: ignore[reportArgumentType]
    return 1.001 * o, state


def raising(*_: Any) -> str:
    """A command that does not answer for its faults."""
    raise RuntimeError("a fault")


# So many cases from the seed on, until one comes by the break.
TRIES = 25
# Attack: the seed to begin with, where the break is, and what is there instead.
VICTIMS: dict[str, tuple[int, Any, str, Callable[..., Any]]] = {
    "kills": (3, checkpoint, "load_file", optimizer_forgotten),
    "flips": (195, files, "check_digests", checksums_ignored),
    "disk": (0, files, "naming", full_disk_unanswered),
    "ops": (8, linear_attention_torch, "decayed_linear_attention_torch", wrong_factor),
    "commands": (275, corpus_command, "summary", raising),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        world = World(Path(folder))
        for attack, (seed, place, name, broken) in VICTIMS.items():
            with mock.patch.object(place, name, broken):
                problems = (CASES[attack](world, number).problem for number in range(seed, seed + TRIES))
                print(f"{attack}: {next(filter(None, problems), '')}", flush=True)
