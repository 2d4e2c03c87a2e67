"""A disk that runs full at any moment: one line says so, and with room again the same command ends with the same
bits."""

import random
import shutil

from tests.soak.attempts import limit_files, log_uniform, on_change
from tests.soak.kills import finished_the_same
from tests.soak.world import Outcome, World


def case(world: World, seed: int) -> Outcome:
    draw = random.Random(f"disk {seed}")
    subject = world.subjects[draw.choices(["comparison", "two processes"], [3, 1])[0]]
    out = world.place("disk", seed) / "out"
    # Now from the first file on, now in the middle of the work.
    victim = draw.randrange(subject.n_processes)
    at = draw.randint(1, max(1, subject.n_changes[victim]))
    n_bytes = log_uniform(draw, 1, 300_000)

    def ahead(rank: int) -> None:
        if rank == victim:
            on_change(out, lambda number: number == at and limit_files(n_bytes))

    ended = subject.run(out, ahead)
    problem = ended.problem
    if not problem and (ended.code not in (0, 1) or (ended.code and not ended.last_line.startswith("error: "))):
        problem = f"code {ended.code}: {ended.last_line}"
    if problem:
        problem = f"limit of {n_bytes} bytes from change {at} on: {problem}"
    else:
        problem = finished_the_same(subject, out)
    shutil.rmtree(out.parent)
    return Outcome(subject=subject.name, how="said so, then identical" if ended.code else "had room", problem=problem)
