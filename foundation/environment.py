"""Where and with what a number was made: commit, versions, device. Torch is imported where it is asked: commands on
text need none of its seconds and 200 MB."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.source import ROOT

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "safetensors")


def environment(**more: Any) -> dict[str, Any]:
    """What results depend on beside the configuration, ready for JSON.

    Args:
        more: further entries, for instance the hash of the data.
    """
    import torch

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": uncommitted_changes(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "processes": int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1,
        **more,
    }


def under_torchrun() -> bool:
    """Whether torchrun started this process. WORLD_SIZE and LOCAL_RANK alone may be left over from another program."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def device_name() -> str:
    """The GPU that torch takes first, or the processor and its number of cores."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()} ({os.cpu_count()} cores)"


def cpu_name() -> str:
    """The processor's model where the system tells it (Linux), otherwise what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def short_commit() -> str:
    """Of the checkout, with a plus sign where tracked files are edited; "unknown" where git does not tell."""
    name, edited = git("rev-parse", "--short", "HEAD"), uncommitted_changes()
    return "unknown" if name is None or edited is None else name + ("+" if edited else "")


def uncommitted_changes() -> bool | None:
    """Whether tracked files are edited; None where git does not tell."""
    status = git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Output of git in this checkout; None where git fails, or where these files are in no repository of their own: an
    archive unpacked inside another repository must not bear that one's commit."""
    top = _run_git("rev-parse", "--show-toplevel")
    return _run_git(*arguments) if top is not None and Path(top).resolve() == ROOT else None


def _run_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory(device: "torch.device") -> int:
    """Bytes: the most this process has held so far, or the most tensors have held on the GPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In KiB everywhere but on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Of the machine, or what a container lets this process have of it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine
