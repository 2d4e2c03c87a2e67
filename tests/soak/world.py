"""What is attacked: a tiny comparison, a two-process training and a two-stage run on a small text, and how they end
when nothing disturbs them."""

import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.soak.attempts import Attempt, Ended, on_change, together
from tests.test_command_lines import run

# Commands import these when they need them: here once, instead of in every attempt.
for module in ("ablations.cli", "lm.__main__", "corpus.__main__", "moe.__main__", "staged_training.__main__"):
    importlib.import_module(module)
for module in ("triton_kernels.__main__", "staged_training.many_processes", "matplotlib.pyplot", "torch._dynamo"):
    importlib.import_module(module)

VOCABULARY = "300"
SIZES = (
    *("--d-model", "16", "--n-layers", "2", "--n-heads", "2", "--n-kv-heads", "1", "--head-dim", "8"),
    *("--n-experts", "8", "--d-expert", "8", "--k", "2", "--dtype", "float32"),
)
STAGING = ("--tokens", "960", "--batch-size", "2", "--seq-len", "16")
OFTEN = ("--save-every", "4", "--log-every", "10")

# What depends on the clock, on the machine or, through a checksum, on one of these.
BY_THE_CLOCK = {"timing.jsonl", "seal.json", "report.html", "environment.json", ".lock"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case.

    Attributes:
        subject: what was attacked; with the attack it names a row of the table.
        how: in a word, how it ended: "identical", "refused", "made again".
        count: attempts that it counts for: every kill of a chain, say.
        problem: what should not have happened; "" where all is well.
    """

    subject: str
    how: str
    count: int = 1
    problem: str = ""


class Subject:
    """A command that trains into a folder, in one process or two.

    Attributes:
        name: in the table.
        straight: what an undisturbed run leaves, see `ending`.
        n_changes: how often that run changes files, by process.
    """

    def __init__(self, name: str, work: Callable[[Path], None], n_processes: int = 1) -> None:
        self.name, self._work, self.n_processes = name, work, n_processes
        self.straight: dict[str, str] = {}
        self.n_changes: list[int] = []

    def run(
        self,
        out: Path,
        ahead: Callable[[int], object] = lambda _: None,
        *,
        timeout_s: float = 300.0,
        kill_after_s: float | None = None,
    ) -> Ended:
        """One attempt in `out`.

        Args:
            ahead: called in each process, with its number, before the command.
        """

        def work(rank: int = 0) -> None:
            ahead(rank)
            self._work(out)

        if self.n_processes == 1:
            return together([Attempt(work)], timeout_s=timeout_s, kill_after_s=kill_after_s)
        # As torchrun does: it tells them of each other, and when one is gone it ends the others.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def joined(rank: int) -> None:
            of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.n_processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in of_torchrun.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "soak"}
            work(rank)

        started = [Attempt(functools.partial(joined, rank)) for rank in range(self.n_processes)]
        return together(started, timeout_s=timeout_s, kill_after_s=kill_after_s)

    def learn(self, out: Path) -> None:
        """Runs undisturbed, to know what must come out.

        Raises:
            RuntimeError: where that fails.
        """

        def count(rank: int) -> None:
            tally = out.with_name(f"{out.name}.changes_{rank}")
            file = os.open(tally, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            on_change(out, lambda _: os.write(file, b"."))

        ended = self.run(out, count)
        if ended.code or ended.problem:
            raise RuntimeError(f"{self.name} fails undisturbed:\n{ended.output}")
        self.straight = ending(out)
        self.n_changes = [
            out.with_name(f"{out.name}.changes_{rank}").stat().st_size for rank in range(self.n_processes)
        ]


def ending(out: Path) -> dict[str, str]:
    """A digest of every file below a folder that must not depend on what happened on the way, by its path."""
    return {
        str(path.relative_to(out)): hashlib.sha256(comparable(path)).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in BY_THE_CLOCK and not _of_a_checkpoint(path)
        # Damaged branches are kept there for whoever wants to know what happened to them.
        if path.relative_to(out).parts[0] != "damaged"
    }


def _of_a_checkpoint(path: Path) -> bool:
    """Its manifest and the shards of several processes: they hold checksums of seconds, and names drawn by chance."""
    return "checkpoints" in path.parts and (path.name == "manifest.json" or "shards" in path.parts)


def comparable(path: Path) -> bytes:
    """A file's content without what is measured in seconds or tells of the way to it."""
    content = path.read_bytes()
    try:
        if path.name == "ledger.json":
            return repr({kind: cost["flops"] for kind, cost in json.loads(content).items()}).encode()
        # A result tells which damaged checkpoints were passed over.
        if left_out := {"state.json": ("seconds", "logs"), "result.json": ("skipped_checkpoints",)}.get(path.name):
            return repr({k: v for k, v in json.loads(content).items() if k not in left_out}).encode()
        # What was asked, the folder itself among it.
        if path.name == "options.toml":
            return re.sub(rb"(?m)^out = .*$", b"", content)
        if path.name in ("table.csv", "costs.csv"):
            rows = csv.DictReader(io.StringIO(content.decode()))
            return repr([{k: v for k, v in row.items() if "second" not in (k or "")} for row in rows]).encode()
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return content


def difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """The first file that differs between two endings, and how; "" where none does."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            how = "is missing" if name not in found else "should not be there" if name not in expected else "differs"
            return f"{name} {how}"
    return ""


class World:
    """A folder with the text and the subjects, each run once undisturbed."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("comparison", "two processes")) -> None:
        self.folder = folder
        self.text = folder / "text"
        self.text.mkdir()
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
        for number in range(25):
            (self.text / f"{number}.txt").write_text(f"document {number}: " + " ".join(draw.choices(words, k=60)))
        of_corpus = ("--data", str(self.text), "--vocab-size", VOCABULARY)
        self.compare = ("compare", "top_p", *of_corpus, *SIZES, *STAGING, *OFTEN, "--freeze", "0.5", "--seeds", "1")
        self.compare += ("--budget-batches", "1")
        self.staged = [*of_corpus, *SIZES, *STAGING, *OFTEN]
        self.subjects = {
            "comparison": Subject("comparison", lambda out: run("ablations", *self.compare, "--out", str(out))),
            "two processes": Subject(
                "two processes", lambda out: run("staged_training", "parallel", *self.staged, "--out", str(out)), 2
            ),
        }
        (folder / "straight").mkdir()
        for name in names:
            self.subjects[name].learn(self.straight(name))

    def straight(self, name: str) -> Path:
        """What an undisturbed run of a subject has left; to be copied, not changed."""
        return self.folder / "straight" / name.replace(" ", "_")

    def place(self, attack: str, seed: int) -> Path:
        """An empty folder for a case."""
        folder = self.folder / f"{attack}_{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder
