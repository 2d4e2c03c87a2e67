"""A C source beside a Python file, compiled on first use for the processor that the machine has, and kept in the user's
cache folder. Without a compiler, or with HYBRID_MOE_NATIVE=0, there is none, and the caller's numpy form stands in."""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from foundation.environment import cpu_name
from foundation.files import fingerprint
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
    folder = user_cache()
    built = folder / f"{source.stem}-{fingerprint([source.read_text(), command, cpu_name()])[:16]}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Several processes may build at once: each for itself, and the last one's takes the place.
            with tempfile.TemporaryDirectory(dir=folder) as own:
                made = Path(own) / built.name
                if subprocess.run([*command, "-o", made, source], capture_output=True).returncode:
                    return None
                made.rename(built)
        library = ctypes.CDLL(str(built))
    except OSError:
        return None
    for name, (result, arguments) in signatures.items():
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    return library
