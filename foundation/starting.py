"""Imported by every command before anything else: a stop signal that comes while the rest is imported, which takes
seconds, is one line and an exit code too. `run_command` takes over from here.

Where another program imports a command's module (a test, a notebook) this does nothing.
"""

import os
import signal
import sys
from pathlib import Path

from foundation.stopping import SIGNALS


def _leave(number: int, frame: object) -> None:
    os.write(2, f"\nstopped by {signal.Signals(number).name} before it began\n".encode())
    # An import that is cut off may be caught, and half a module used; there is nothing to clean up yet.
    os._exit(128 + number)


def _is_our_command() -> bool:
    root, file = Path(__file__).resolve().parent.parent, getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).is_relative_to(root) and ".venv" not in Path(file).parts


if _is_our_command():
    for number in SIGNALS:
        # Ignored ones (nohup) stay ignored.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave)
