"""What `python -m ablations gate` exits with: 0 keep, 1 discard, 2 unresolved, and nothing else below 64.

Every other command ends errors with 1 and 2 (`foundation.command`). Here these would read as verdicts, so errors get
the codes that `sysexits.h` has for them: 64 for a command line that is none, 65 for data, options or a disk that cannot
be used, 70 for an error of ours, with its traceback; stop signals stay 128 + n. Python's own failures ahead of the
first line of this project, an interpreter without torch say, exit with 1 like any script: a caller that wants to be
sure asks for `--json`, which prints something only where there is a verdict.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

from ablations.gate.decision import Answer

CODES: dict[Answer, int] = {"keep": 0, "discard": 1, "unresolved": 2}
NO_COMMAND_LINE, UNUSABLE, OURS = 64, 65, 70


class Verdict(SystemExit):
    """Ends a gate with the code of its answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(CODES[answer])


@contextlib.contextmanager
def errors_apart() -> Iterator[None]:
    """While entered, what ends `run_command` with the code of a verdict and is none, ends with another."""
    try:
        yield
    except Verdict:
        raise
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            raise SystemExit(UNUSABLE) from None
        if stop.code in (1, 2):
            raise SystemExit(NO_COMMAND_LINE if stop.code == 2 else UNUSABLE) from None
        raise
    except Exception:
        traceback.print_exc()
        raise SystemExit(OURS) from None


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[None]:
    """While entered, what this process and those that it starts print goes to standard error."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        # Closed streams have nothing to be kept apart.
        with contextlib.suppress(OSError):
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
