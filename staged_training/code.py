"""Which code a run depends on. It is part of a run's identity: results of old code are not served for new code.

A run depends on what training imports, and on the files of its model's routing policies: who edits a policy trains the
branches that use it again, and neither the trunk nor the others. Attention has no such division: all kinds are
imported. Versions of torch and triton count as code.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foundation.environment import version
from foundation.source import ROOT, code_of, file_code
from lm.config import ModelConfig

TRAINING = ("staged_training.execute", "staged_training.many_processes")
LIBRARIES = ("torch", "triton")
CODE = "code"


def code_behind(model: ModelConfig, files: Mapping[str, Path] | None = None) -> dict[str, str]:
    """Fingerprints, by file, of the code that trains a model.

    Args:
        files: further ones that its results depend on, by the name they get.
    """
    policies = {type(model.block(layer).moe.router.policy).__module__ for layer in range(model.n_layers)}
    more = {name: file_code(path) for name, path in (files or {}).items()}
    return {**code_of((*TRAINING, *sorted(policies))), **more, **{name: version(name) or "none" for name in LIBRARIES}}


def apart_from_code(identity: Any) -> Any:
    """An identity, as JSON has it, without what it says of code."""
    if not isinstance(identity, dict):
        return identity
    return {key: apart_from_code(value) for key, value in identity.items() if key != CODE}


def code_changes(stored: Any, asked: Any) -> list[str]:
    """The files and libraries in which two identities differ, by name."""
    pairs = list(zip(_codes(stored), _codes(asked), strict=True))
    if not all(old for old, _ in pairs):
        return ["its code is not known: it is from before runs recorded it"]
    return sorted({name for old, new in pairs for name in old | new if old.get(name) != new.get(name)})


def changed_since(identity: Any) -> list[str]:
    """The files and libraries of an identity that are not what they were, by name."""
    now = {name: version(name) or "none" for name in LIBRARIES}
    recorded = {name: digest for code in _codes(identity) for name, digest in code.items()}
    present = {name: now.get(name) or (file_code(ROOT / name) if (ROOT / name).is_file() else "") for name in recorded}
    return sorted(name for name, digest in recorded.items() if digest != present[name])


def _codes(identity: Any) -> Iterator[dict[str, str]]:
    """Of a trunk's identity its own, of a branch's the trunk's and its own."""
    for part in (identity["trunk"], identity["branch"]) if "branch" in identity else (identity,):
        yield part.get(CODE, {})
