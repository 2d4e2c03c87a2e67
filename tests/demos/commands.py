"""The demos' commands in this process, as a shell would see them."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import tyro

from demos import browser, terminal
from foundation.command import run_command
from lm.__main__ import GenerateConfig, run_generate

COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "terminal": (terminal.DemoConfig, terminal.main),
    "browser": (browser.BrowserConfig, browser.main),
    "generate": (GenerateConfig, run_generate),
}


@dataclasses.dataclass
class Said:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run(command: str, *arguments: object) -> Said:
    """One command with its arguments, into pipes."""
    config, main = COMMANDS[command]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(lambda given: tyro.cli(config, prog=command, args=given), main, [*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code if isinstance(stop.code, str) else "", file=err)
    return Said(code, out.getvalue(), err.getvalue())
