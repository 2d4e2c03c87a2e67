"""A changed byte or a cut in any file that a run leaves, finished or killed on its way. Whoever reads the file next
comes to the same result, or names it and leaves; never another number."""

import os
import random
import re
import shutil
from pathlib import Path

from tests.soak.attempts import Ended, attempt, die, on_change
from tests.soak.world import Outcome, Subject, World, comparable, difference, ending
from tests.test_command_lines import run


def case(world: World, seed: int) -> Outcome:
    draw = random.Random(f"flips {seed}")
    subject = world.subjects[draw.choices(["comparison", "two processes"], [5, 1])[0]]
    out = world.place("flips", seed) / "out"
    if draw.random() < 0.6:
        shutil.copytree(world.straight(subject.name), out)
    else:
        at = [draw.randint(1, max(1, n)) for n in subject.n_changes]
        subject.run(out, lambda rank: on_change(out, lambda number: number == at[rank] and die()))
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.stat().st_size]
    kinds = sorted({kind_of(path, out) for path in files})
    if not kinds:
        return Outcome(subject="(nothing written yet)", how="nothing to damage")
    kind = draw.choice(kinds)
    path = draw.choice([path for path in files if kind_of(path, out) == kind])
    whole = path.read_bytes()
    damage(path, draw)
    damaged = path.read_bytes()

    problem = read_by_its_own_command(world, subject, path, out)
    if not problem:
        ended = subject.run(out)
        how, problem = judged(ended, path)
        if not problem and how == "refused":
            # What it advises: put the file back.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)
            again = subject.run(out)
            problem = "" if again.code == 0 else f"with {path.name} put back: {again.last_line}"
        if not problem:
            unread = path.is_file() and path.read_bytes() == damaged
            found, expected = ending(out), dict(subject.straight)
            if unread:
                for end in (found, expected):
                    end.pop(str(path.relative_to(out)), None)
            if how == "made again" and "activations" in path.parts:
                # What was computed twice was paid for twice, and the ledger says so.
                found, expected = (
                    {name: x for name, x in end.items() if not _of_costs(name)} for end in (found, expected)
                )
            problem = difference(found, expected)
            how = "not read, same result" if unread and how != "refused" else how
    shutil.rmtree(out.parent)
    return Outcome(subject=kind, how=how if not problem else "", problem=problem and f"{path.name}: {problem}")


def _of_costs(name: str) -> bool:
    return name.endswith(("ledger.json", "costs.csv"))


def kind_of(path: Path, out: Path) -> str:
    """A file's place in the folder, without what differs between folders of a kind."""
    parts = path.relative_to(out).parts
    kept = [re.sub(r"[0-9a-f]{8,}|step_\d+|_?\d+|__", "", part) for part in parts]
    rooms = [part for part in kept[1:-1] if part in ("checkpoints", "model", "activations")]
    return "/".join([kept[0], *rooms, kept[-1]])


def damage(path: Path, draw: random.Random) -> None:
    """Changes a byte, or cuts the file."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        os.truncate(path, at)
    else:
        content[at] ^= draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        path.write_bytes(content)


def judged(ended: Ended, path: Path) -> tuple[str, str]:
    """(how a reader took a damaged file, what is wrong with that)."""
    if ended.problem:
        return "", ended.problem
    if ended.code == 0:
        return "made again", ""
    if ended.code != 1 or not ended.last_line.startswith("error: "):
        return "", f"code {ended.code}: {ended.last_line}"
    if path.name not in ended.output and path.parent.name not in ended.output:
        return "", f"refused without naming it: {ended.last_line}"
    return "refused", ""


def read_by_its_own_command(world: World, subject: Subject, path: Path, out: Path) -> str:
    """Runs the command that reads files of this kind besides the one that made them, where there is one; says what is
    wrong."""
    inside = path.relative_to(out)
    room = inside.parts[0]
    if any(part.startswith(".") for part in inside.parts[:-1]):
        # What a killed process left under a temporary name.
        return ""
    if "model" in inside.parts[:-1]:
        folder = Path(*inside.parts[: inside.parts.index("model") + 1])
        words = ("lm", "generate", "--max-new-tokens", "9", "--temperature", "0", "--run")
    elif room == "corpus" and len(inside.parts) > 2:
        folder, words = Path(*inside.parts[:2]), ("corpus", "show")
    elif room in ("comparisons", "branches", "trunks") and list(out.glob("comparisons/*/table.csv")):
        (comparison,) = out.glob("comparisons/*")
        folder, words = comparison.relative_to(out), ("ablations", "report")
    else:
        return ""

    def read(root: Path) -> Ended:
        return attempt(lambda: run(*words, str(root / folder)))

    ended = read(out)
    how, problem = judged(ended, path)
    if problem or how == "refused" or not (world.straight(subject.name) / folder).is_dir():
        return problem
    expected = read(world.straight(subject.name))
    if said(ended, out) != said(expected, world.straight(subject.name)):
        return f"{ended.last_line!r} instead of {expected.last_line!r}"
    table = out / folder / "table.csv"
    if table.is_file() and comparable(table) != comparable(world.straight(subject.name) / folder / "table.csv"):
        return "another table.csv"
    return ""


def said(ended: Ended, out: Path) -> str:
    """What a command printed, without the place, warnings and what is measured in seconds."""
    lines = ended.output.replace(str(out), "").splitlines()
    return "\n".join(line for line in lines if "tokens/s" not in line and not line.startswith("WARNING"))
