"""The policies: one file each. Every file of this folder is imported here, so that a policy exists by lying in it."""

import functools
import importlib
import operator
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.serialize import kinds
from routing.policy import PolicyConfig

for _path in sorted(Path(__file__).parent.glob("*.py")):
    if _path.stem != "__init__":
        importlib.import_module(f"{__name__}.{_path.stem}")

if TYPE_CHECKING:
    AnyPolicy = PolicyConfig
else:
    # Command lines (tyro) offer the members of a union as subcommands; of a base class they would see no kind.
    AnyPolicy = functools.reduce(operator.or_, kinds(PolicyConfig).values())
