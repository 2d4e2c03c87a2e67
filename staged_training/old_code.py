"""Runs that other code has trained, or begun, counted as those of a plan: what `--accept-old-code` asks for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foundation.files import read_json
from staged_training.code import CODE, code_changes
from staged_training.plan import Branch, Plan
from staged_training.record import CONFIG, RESULT, json_differences, named, of_other_code


def accepted(plan: Plan, trunk_folder: Path) -> tuple[Plan, Path]:
    """The plan of the code that has trained its trunk already, where the present code has not, and the folder where
    that trunk lies; otherwise both as they are."""
    for run, stored in _of_other_code(trunk_folder, plan.trunk_identity):
        _say("trunk", run, stored, plan.trunk_identity)
        return dataclasses.replace(plan, code=stored.get(CODE, {})), run
    return plan, trunk_folder


def with_accepted_branches(plan: Plan, folder_of: Callable[[Branch], Path]) -> Plan:
    """The plan with branches of the code that has trained them already, each by itself, where the present code has
    not."""
    branches = []
    for branch in plan.branches:
        identity = plan.branch_identity(branch)
        for run, stored in _of_other_code(folder_of(branch), identity):
            # Of this very trunk: from one that other code has trained it starts elsewhere.
            if not json_differences(stored["trunk"], identity["trunk"]):
                _say(branch.name, run, stored, identity)
                branch = dataclasses.replace(branch, code=stored["branch"].get(CODE, {}))
                break
        branches.append(branch)
    return dataclasses.replace(plan, branches=tuple(branches))


def _of_other_code(folder: Path, identity: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Runs of other code and their identities, see `of_other_code`; none where the present code's is finished."""
    if (folder / RESULT).exists() and not json_differences(read_json(folder / CONFIG), identity):
        return []
    return [(run, read_json(run / CONFIG)) for run in of_other_code(folder, identity)]


def _say(label: str, run: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    changed = named(code_changes(stored, identity))
    print(f"{label}: {run} counts, though other code trained it: {changed} changed", flush=True)
