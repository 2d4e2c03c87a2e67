"""The processes of a command's `--processes N` on this machine, as torchrun would start them.

Started so, a command line that is none is refused before there are any, in the words of every other command; what ends
one process is said once; and nothing is added to it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from foundation.stopping import Interrupted

# How long processes have to save what they have when another one has ended, in seconds.
PATIENCE_S = 600
# Exit code of a process that another one has left alone: it says nothing, because that one knows why.
LEFT_ALONE = 75
# What a process that has failed, and one that it left alone, need to find that out.
NOTICED_S = 5.0


def launch(n_processes: int, words: Sequence[str]) -> None:
    """Runs `python -m` with these words in so many processes, until all of them have ended.

    Raises:
        SystemExit: with the code of the first that fails.
        foundation.stopping.Interrupted: after a stop signal, which all of them have been sent.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        **{"WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes), "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": f"launched-{os.getpid()}"},
    }
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes)))
    command = [sys.executable, "-m", *words]
    with contextlib.ExitStack() as files:
        # What the others say the first one says too; it is shown where that one has no reason to.
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(n_processes - 1)]
        processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL if rank else None,
                stderr=said[rank - 1] if rank else None,
            )
            for rank in range(n_processes)
        ]
        try:
            failed = _first_failure(processes)
        except Interrupted as stopped:
            _stop(processes, stopped.signal_number)
            raise
        if failed is None:
            return
        _stop(processes, signal.SIGTERM)
        code = processes[failed].returncode
        if code < 0:
            name = signal.Signals(-code).name
            killed = f"process {failed + 1} of {n_processes} was killed by {name}"
            sys.stderr.write(f"error: {killed}; the same command continues\n")
            sys.exit(128 - code)
        if failed and processes[0].returncode in (0, LEFT_ALONE):
            said[failed - 1].seek(0)
            sys.stderr.write(said[failed - 1].read())
        sys.exit(code)


def _first_failure(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits; the rank of the one that the others ended with: the first of those that were not left alone. None where
    all end well."""
    noticed = None
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            noticed = noticed or time.monotonic()
            # Whoever failed may be about to say why, and the first one too.
            if None not in codes or time.monotonic() - noticed > NOTICED_S:
                failed = [rank for rank, code in enumerate(codes) if code]
                return next((rank for rank in failed if codes[rank] != LEFT_ALONE), failed[0])
        elif None not in codes:
            return None
        time.sleep(0.1)


def _stop(processes: Sequence[subprocess.Popen], signal_number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal_number)
    for process in processes:
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
