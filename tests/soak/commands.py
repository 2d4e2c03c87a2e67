"""Random command lines: options and values from what each command's own help says, legal but odd ones and malformed
ones. No traceback, exit codes 0, 1 and 2, and a refused command line leaves no files."""

import functools
import os
import random
import re
import resource
import shutil
from pathlib import Path

from tests.soak.attempts import attempt
from tests.soak.world import Outcome, World
from tests.test_command_lines import INTERNAL, run

# Longer ones are asked to stop, which they must answer as well.
LONGEST_S = 20.0
ROOM_BYTES = 3 * 2**30
# {out} is an empty folder, {text} one with texts, {model} a trained model's, {runs} a folder of runs with the others.
# Nothing outside of the case's own folder that could be written to.
PATHS = (
    "{out}",
    "{out}/new/folder",
    "{text}",
    "{model}",
    "{runs}",
    "/dev/null/x",
    "/proc/x",
    "",
    "nowhere",
    "{out}\x1b",
)
VALUES = {
    "INT": (
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "64",
        "1" + "0" * 23,
        "nan",
        "x",
        "",
        " 3",
        "1_0",
        "0x10",
        "1e3",
        "2.5",
        "٣",
    ),
    "FLOAT": ("0", "0.5", "1", "-1", "2", "nan", "inf", "-inf", "1e400", "1e-320", "x", "", "1_0", "0.1.2"),
    "STR": ("", " ", "\x1b[31m", "é", "F" * 300, "--", "{", "[]", "null", "F", "FX", '{"type": "TopK", "k": 2}'),
    "PATH": PATHS,
}
HEADS = ("--d-model", "16", "--n-layers", "2", "--n-experts", "4", "--d-expert", "8", "--n-heads", "2")
HEADS += ("--n-kv-heads", "1", "--head-dim", "8", "--k", "2")
FEW = ("--tokens", "640", "--batch-size", "2", "--seq-len", "16")
TRAINING = ("--out", "{out}", "--data", "{text}", "--vocab-size", "300", *HEADS, *FEW)
COMPARING = ("top_p", *TRAINING, "--dry-run")
COMMANDS = {
    "staged_training run": (*TRAINING, "--dry-run"),
    "staged_training parallel": TRAINING,
    "staged_training diagnostics": ("{trunk}",),
    "ablations list": (),
    "ablations compare": COMPARING,
    "ablations budgets": COMPARING,
    "ablations difficulty": ("--out", "{out}", "--data", "{text}", "--phase", "analyse"),
    "ablations report": ("{comparison}",),
    "ablations runs": ("{runs}",),
    "ablations prune": ("{runs}",),
    "corpus prepare": ("--root", "{out}", "--data", "{text}", "--vocab-size", "300"),
    "corpus show": ("{corpus}",),
    "lm generate": ("--run", "{model}", "--max-new-tokens", "3"),
    "lm bench": ("--seq-len", "8", "--decode-tokens", "4", "--repeats", "1", "--threads", "1", *HEADS),
    "moe bench": (
        "--tokens",
        "16",
        "--d-model",
        "16",
        "--n-experts",
        "4",
        "--d-expert",
        "8",
        "--k",
        "2",
        "--repeats",
        "1",
    ),
    "triton_kernels bench": ("--op", "gated_rms_norm", "--repeats", "1"),
    "demos": ("--run", "{model}", "--max-new-tokens", "3"),
}
# An option at the start of a line of help, whatever frames it, and what it takes.
OPTION = re.compile(r"^[│\s]*(--[a-z][\w.-]*)(?:,? --no-[\w.-]+)?(?: (\S[^│]*?))?(?:\s\s|\s*│|\s*$)")


@functools.cache
def options_of(command: str) -> tuple[tuple[str, str], ...]:
    """(option, what it takes) from the command's own help."""
    said = attempt(lambda: run(*command.split(), "--help")).output
    found = [match for line in said.splitlines() if (match := OPTION.match(line))]
    return tuple((match[1], (match[2] or "").strip()) for match in found)


def value(takes: str, draw: random.Random) -> str:
    """A value for an option: mostly one of the type that it takes."""
    choices = re.findall(r"\{([^}]*)\}", takes)
    if choices and draw.random() < 0.6:
        # A tracker would talk to the network.
        return draw.choice([word for word in re.split(r"[,|]", draw.choice(choices)) if word != "wandb"] or [""])
    kinds = [kind for kind in VALUES if kind in takes] or list(VALUES)
    return draw.choice(VALUES[draw.choice(kinds) if draw.random() < 0.85 else draw.choice(list(VALUES))])


def command_line(command: str, draw: random.Random) -> list[str]:
    """The command's words, some of them odd."""
    words = list(COMMANDS[command])
    for option, takes in draw.choices(options_of(command) or [("--help", "")], k=draw.choice([0, 1, 1, 1, 2, 3])):
        drawn = [value(takes, draw)] if takes or draw.random() < 0.2 else []
        words += [f"{option}={drawn[0]}"] if drawn and draw.random() < 0.5 else [option, *drawn]
    way = draw.random()
    if words and way < 0.1:
        del words[draw.randrange(len(words))]
    elif words and way < 0.2:
        words.insert(draw.randrange(len(words)), draw.choice(words))
    elif way < 0.25:
        words.append(draw.choice(["--no-such-option", "-x", "word", "--", "--help", ""]))
    elif words and way < 0.3:
        words[-1] = draw.choice(PATHS)
    return words


def case(world: World, seed: int) -> Outcome:
    draw = random.Random(f"commands {seed}")
    command = draw.choice(list(COMMANDS))
    folder = world.place("commands", seed)
    # Copied, because commands write into what they are given.
    shutil.copytree(world.straight("comparison"), folder / "runs")
    shutil.copytree(world.text, folder / "text")
    places = {f"{{{name}}}": str(folder / name) for name in ("out", "text", "runs")}
    for name, place in (("model", "branches/*/model"), ("trunk", "trunks/*"), ("corpus", "corpus/*")):
        places[f"{{{name}}}"] = str(min(folder.glob(f"runs/{place}")))
    places["{comparison}"] = str(min(folder.glob("runs/comparisons/*")))
    words = command_line(command, draw)
    given = [functools.reduce(lambda word, place: word.replace(*place), places.items(), word) for word in words]
    before = files(folder)

    def work() -> None:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM_BYTES, resource.RLIM_INFINITY))
        run(*command.split(), *given)

    ended = attempt(work, timeout_s=LONGEST_S)
    problem = ended.problem
    stopped = ended.timed_out and ended.code in (-15, 128 + 15)
    if not problem and ended.code not in (0, 1, 2) and not stopped:
        problem = f"code {ended.code}: {ended.last_line}"
    if not problem and ended.code in (1, 2) and any(name in ended.output for name in INTERNAL):
        problem = f"says a name from inside a parser: {ended.last_line}"
    if not problem and ended.code == 2 and (left := files(folder) - before):
        problem = f"refused and left {sorted(left)[0]}"
    if not problem and ended.code == 1 and (left := {name for name in files(folder) - before if half_written(name)}):
        problem = f"failed and left {sorted(left)[0]}"
    shutil.rmtree(folder)
    how = "stopped when asked to" if stopped else {0: "done", 1: "error in one line", 2: "refused"}.get(ended.code, "")
    return Outcome(subject=command, how=how, problem=problem and f"{command} {' '.join(map(repr, words))}: {problem}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def half_written(name: str) -> bool:
    """Whether a name is one of those under which files are written before they are whole."""
    return any(
        part.endswith((".tmp", ".partial")) or re.fullmatch(r"\..*\.[0-9a-f]{8}", part) for part in Path(name).parts
    )


def _address_space() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
