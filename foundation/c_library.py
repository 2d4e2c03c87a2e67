"""A C source beside a Python file, compiled on first use for the processor that the machine has, and kept in the user's
cache folder. Without a compiler, or with HYBRID_MOE_NATIVE=0, there is none, and the caller's numpy form stands in."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from foundation.environment import cpu_name
from foundation.files import fingerprint, try_lock
from foundation.source import user_cache

# Contracted products round otherwise than numpy does.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-shared", "-fPIC")


def c_library(source: Path, signatures: Mapping[str, tuple[type, list[type]]]) -> ctypes.CDLL | None:
    """The library of one source; None where it cannot be had.

    Args:
        signatures: by function, what it returns and takes.
    """
    if os.environ.get("HYBRID_MOE_NATIVE") == "0" or platform.system() == "Windows":
        return None
    compiler = next(
        (path for name in (os.environ.get("CC", "cc"), "gcc", "clang") if (path := shutil.which(name))), None
    )
    if compiler is None:
        return None
    command = [compiler, *FLAGS, "-mcpu=native" if platform.machine() == "arm64" else "-march=native"]
    built = user_cache() / f"{source.stem}-{fingerprint([source.read_text(), command, cpu_name()])[:16]}.so"
    try:
        if compile_once(built, [*command, source]):
            return None
        library = ctypes.CDLL(str(built))
    except OSError:
        return None
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library


def compile_once(built: Path, command: Sequence[str | Path]) -> str:
    """Runs a compiler's command for a file that is not there yet; what it said where it failed, "" otherwise.

    Raises:
        OSError: for a folder that cannot be written.
    """
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
                return "\n".join(done.stderr.strip().splitlines()[-1:]) or f"exit code {done.returncode}"
            made.rename(built)
    return ""
