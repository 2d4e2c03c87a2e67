"""Kills at random changes of files, in half-written tensor files and at random moments, again and again; and signals to
real processes. The same command must end with the same bits."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.soak.attempts import TRACEBACK, at_tensor_file, die, on_change
from tests.soak.world import Outcome, Subject, World, difference, ending

ROOT = Path(__file__).resolve().parents[2]
# A chain is a run that is killed so often and then left alone. In a long one of early kills every stage is begun often.
CHAINS = (4, 30, 4)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def case(world: World, seed: int) -> Outcome:
    draw = random.Random(f"kills {seed}")
    out = world.place("kills", seed) / "out"
    # Processes that begin with Python itself take seconds each; they are the comparison's.
    real = seed % 20 == 1
    subject = world.subjects["two processes" if seed % 3 == 2 and not real else "comparison"]
    n_kills, problem = signalled(world, out, draw) if real else chain(subject, out, draw)
    name = subject.name + (", real processes" if real else "")
    problem = problem or finished_the_same(subject, out)
    shutil.rmtree(out.parent)
    return Outcome(subject=name, how="died and ended identical", count=n_kills, problem=problem)


def finished_the_same(subject: Subject, out: Path) -> str:
    """Runs the command undisturbed; says what is not as it must be then."""
    ended = subject.run(out)
    if ended.code or ended.problem:
        return f"does not continue: {ended.problem or ended.last_line}"
    return difference(ending(out), subject.straight)


def chain(subject: Subject, out: Path, draw: random.Random) -> tuple[int, str]:
    """Kills a run until it has ended or been killed often enough: (kills, problem)."""
    mean, most = draw.choice([4, 12, 40]), draw.choice(CHAINS)
    for n_kills in range(most):
        way = draw.choices(["at a change", "in a tensor file", "at a moment"], [6, 2, 2])[0]
        victim = draw.randrange(subject.n_processes)
        # After many kills little is left to do, so later ones come early.
        at = 1 + int(draw.expovariate(mean / subject.n_changes[victim]))
        file = draw.randint(1, 8)

        def ahead(rank: int, way: str = way, victim: int = victim, at: int = at, file: int = file) -> None:
            if rank == victim and way == "at a change":
                on_change(out, lambda number: number == at and die())
            if rank == victim and way == "in a tensor file":
                at_tensor_file(file)

        moment = draw.expovariate(1.0) if way == "at a moment" else None
        ended = subject.run(out, ahead, kill_after_s=moment)
        if not ended.killed:
            problem = ended.problem or (ended.last_line if ended.code else "")
            return n_kills, problem and f"after {n_kills} kills: {problem}"
    return most, ""


def imports_torch(process: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{process}/maps").read_text()
    except FileNotFoundError:
        return False


def signalled(world: World, out: Path, draw: random.Random) -> tuple[int, str]:
    """Real processes of the comparison that get signals: (signals that stopped one, problem)."""
    command = [sys.executable, "-m", "ablations", *world.compare, "--out", str(out)]
    stopped = 0
    for number in draw.sample(SIGNALS, 2):
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        began, patience = time.monotonic(), draw.uniform(0, 10)
        # From the moment at which it is importing: before that it is Python that begins, and knows no signals of ours.
        while process.poll() is None and not imports_torch(process.pid) and time.monotonic() - began < 120:
            time.sleep(0.01)
        time.sleep(patience)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            continue
        stopped += 1
        if process.returncode not in (-signal.SIGKILL, 128 + number) or TRACEBACK in output:
            return stopped, f"{number.name}: code {process.returncode}, {output.strip().splitlines()[-1:]}"
        said = "the same command continues" in output or "before it began" in output
        if number != signal.SIGKILL and not said:
            return stopped, f"{number.name}: does not say that the same command continues"
    return stopped, ""
