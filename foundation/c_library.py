"""C sources beside Python files, compiled on first use for the processor that the machine has, and kept in the user's
cache folder. Without a compiler, or with HYBRID_MOE_NATIVE=0, there is no library, and the caller's other form stands
in."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from foundation.environment import cpu_name
from foundation.files import fingerprint, try_lock
from foundation.source import user_cache

FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC")


class Compiled(NamedTuple):
    """The library and what made it, or None and why there is none."""

    library: ctypes.CDLL | None
    reason: str


def c_library(
    sources: Sequence[Path],
    signatures: Mapping[str, tuple[type | None, list[type]]],
    *,
    flags: Sequence[str],
    libraries: Sequence[str] = (),
) -> Compiled:
    """Compiled once per source, compiler and processor, then loaded.

    Args:
        sources: the first is compiled, and includes the others.
        signatures: by function, what it returns and takes.
        flags: of the compiler, beside those of every library.
        libraries: to link with.
    """
    if os.environ.get("HYBRID_MOE_NATIVE") == "0":
        return Compiled(None, "switched off by HYBRID_MOE_NATIVE=0")
    compiler = next(
        (path for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (path := shutil.which(name))), None
    )
    if compiler is None or platform.system() == "Windows":
        return Compiled(None, "there is no C compiler (cc, gcc or clang)")
    # Apple's clang knows its processors by -mcpu.
    tuned = "-mcpu=native" if platform.machine() == "arm64" else "-march=native"
    command = [compiler, *FLAGS, *flags, tuned]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    identity = fingerprint([*(source.read_text() for source in sources), command, version, cpu_name(), _instructions()])
    built = user_cache() / f"{sources[0].stem}-{identity[:16]}.so"
    try:
        if failed := _compile_once(built, [*command, sources[0], *libraries]):
            return Compiled(None, f"{compiler} failed: {failed}")
        library = ctypes.CDLL(str(built))
    except OSError as error:
        return Compiled(None, str(error))
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return Compiled(library, f"compiled by {compiler} for this processor")


def _compile_once(built: Path, command: Sequence[str | Path]) -> str:
    """Runs a compiler's command for a file that is not there yet; what it said where it failed, "" otherwise."""
    if built.exists():
        return ""
    built.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that begin at once one compiles, which takes a core ten seconds.
    with open(built.parent / "compiling.lock", "w") as file:
        while not try_lock(file.fileno(), built.parent):
            time.sleep(0.1)
        if built.exists():
            return ""
        with tempfile.TemporaryDirectory(dir=built.parent) as own:
            made = Path(own) / built.name
            done = subprocess.run([*command, "-o", made], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                # The source and a mark under the place follow what is wrong.
                wrong = [line for line in lines if "error" in line] or lines
                return wrong[0] if wrong else f"exit code {done.returncode}"
            made.rename(built)
    return ""


def _instructions() -> str:
    """What the processor can do where the system tells it: a home folder may be seen from several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
