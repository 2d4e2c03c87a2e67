"""Numbers that people set: what nothing can be made of is refused where it is set, with what would be legal."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

# Of integers: beyond it sizes overflow on their way through other libraries, and their products long before that.
LARGEST = 2**53


def objection(value: float, lowest: float | None = None) -> str | None:
    """What is legal instead of a number; None where it is legal itself."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if lowest is not None and value < lowest:
        return f"must be at least {lowest}"
    return f"must be at most {LARGEST}" if abs(value) > LARGEST else None


def check_numbers(config: Any, **lowest: float) -> None:
    """Refuses numbers of a config dataclass, those in tuples included, that are not finite, absurdly large, or too
    small.

    Args:
        lowest: by field, the lowest legal value; None is no number, and fine.

    Raises:
        ValueError: naming field, value and what is legal.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and (problem := objection(number, lowest.get(field.name))):
                raise ValueError(f"{type(config).__name__}.{field.name}: {value}, {problem}")


def argument(kind: Callable[[str], float], lowest: float) -> Callable[[str], float]:
    """The `type` of an argument of argparse: a number of this kind, at least so large."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if problem := objection(value, lowest):
            raise argparse.ArgumentTypeError(f"{text}, {problem}")
        return value

    return parse
