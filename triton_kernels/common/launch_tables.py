"""Launch tables: block sizes, warps and pipeline stages of the kernels, as data, by architecture and head width.

A family's `launch_tables.py` holds the tables themselves. Nothing here imports Triton before a table is looked up.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """One option of a launch table: block sizes of the kernel (constexpr names -> values), warps and pipeline
    stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def keywords(self) -> dict[str, int]:
        """All of it, as a kernel's launch takes it."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchTable:
    """(architecture, width) -> at most four options, best guess first. No sequence length appears in a key, and nothing
    is tuned at run time.

    A lookup takes the newest listed architecture that is not newer than the device, and the smallest listed width that
    holds the op's.
    """

    lines: Mapping[tuple[int, int], tuple[LaunchOptions, ...]]

    def __post_init__(self) -> None:
        assert all(1 <= len(options) <= 4 for options in self.lines.values()), (
            "a line of a launch table has one to four options"
        )

    def line(self, width: int, architecture: int) -> tuple[int, int]:
        """The key of the line that serves head widths up to `width`; ValueError when none does."""
        chosen = max((a for a, _ in self.lines if a <= architecture), default=min(a for a, _ in self.lines))
        widths = [listed for a, listed in self.lines if a == chosen]
        if width > max(widths):
            raise ValueError(f"head width {width} is wider than the kernels' widest, {max(widths)}")
        return chosen, min(listed for listed in widths if listed >= width)

    def options(self, width: int, architecture: int | None = None) -> tuple[LaunchOptions, ...]:
        """The options for head widths up to `width`; one of them while `every_option` says which."""
        key = self.line(width, current_architecture() if architecture is None else architecture)
        if _forced is None:
            return self.lines[key]
        wanted, used = _forced
        number = min(wanted, len(self.lines[key]) - 1)
        used.add((self, key, number))
        return (self.lines[key][number],)


# One per kind of call: 2-byte elements first, then fp32, then whatever else the op's launcher tells apart.
Tables = tuple[LaunchTable, ...]

# A table, the key of one of its lines, the number of an option in it.
Option = tuple[LaunchTable, tuple[int, int], int]

# Every table there is.
_tables: list[LaunchTable] = []


def launch_table(blocks: str, widths: Sequence[int], **lines: Sequence[Any]) -> LaunchTable:
    """A table as data: for each architecture (sm_90=[...]) and each of `widths` one option, or a list of them; an
    option is a value for each name in `blocks`, then warps, then stages."""

    def option(values: tuple[int, ...]) -> LaunchOptions:
        return LaunchOptions(
            blocks=dict(zip(blocks.split(), values[:-2], strict=True)), num_warps=values[-2], num_stages=values[-1]
        )

    keyed = {
        (int(name.removeprefix("sm_")), width): options
        for name, line in lines.items()
        for width, options in zip(widths, line, strict=True)
    }
    _tables.append(
        LaunchTable(
            lines={
                key: tuple(map(option, found if isinstance(found, list) else [found])) for key, found in keyed.items()
            }
        )
    )
    return _tables[-1]


def all_tables() -> tuple[LaunchTable, ...]:
    """Those of the modules imported so far."""
    return tuple(_tables)


# The number of the option in force, and what was looked up meanwhile. A plain global, no context variable: autograd
# looks tables up from threads of its own.
_forced: tuple[int, set[Option]] | None = None


def every_option() -> Iterator[tuple[int, set[Option]]]:
    """In turn for 0, 1, ...: every lookup gives the option of that number of its line alone (the last one of a shorter
    line) and is noted in the set, until each line looked up has had all of its options."""
    global _forced
    number, others, previous = 0, True, _forced
    while others:
        _forced = number, used = number, set()
        try:
            yield number, used
        finally:
            _forced = previous
        number += 1
        others = any(number < len(table.lines[key]) for table, key, _ in used)


def current_architecture() -> int:
    """80, 90, 100: the compute capability kernels are being compiled for; that of the oldest supported device under the
    interpreter."""
    from triton import knobs
    from triton.runtime import driver

    return 80 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)  # pyright: ignore[reportAttributeAccessIssue]
