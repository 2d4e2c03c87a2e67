"""RouterTrace: which experts every token used, recorded to files while a `with` block runs, and nothing at all outside
of one.

    with RouterTrace(model, folder):
        model(tokens_BT)
    rows = read_trace(folder)     # rows.layer, rows.forward, rows.token, rows.expert, rows.weight

One entry per dispatched row: physical experts. The folder holds `rows_00000.npz`, `rows_00001.npz`, ... (numpy
archives, compressed), each complete by itself: a process that dies loses what it had not written yet and nothing else.

Legend: arrays here are columns of one entry per dispatched row.
"""

import contextlib
import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from foundation.files import write_bytes
from routing.router import Router, Routing

PATTERN = "rows_*.npz"


@dataclasses.dataclass(frozen=True)
class TracedRows:
    """Columns of one length, in the order in which layers ran; the rows of one call are sorted by expert, then token.

    Attributes:
        layer: int32, the router's layer_index.
        forward: int32, how many times this layer had run before in this trace.
        token: int32, position among the tokens of that call, batch and time flattened.
        expert: int32.
        weight: float32.
    """

    layer: np.ndarray
    forward: np.ndarray
    token: np.ndarray
    expert: np.ndarray
    weight: np.ndarray


_unrecorded: ContextVar[bool] = ContextVar("unrecorded", default=False)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Forwards inside the block are no part of any trace: those that set a budget while a text is generated."""
    token = _unrecorded.set(True)
    try:
        yield
    finally:
        _unrecorded.reset(token)


COLUMNS = tuple(field.name for field in dataclasses.fields(TracedRows))


class RouterTrace:
    """Records every forward of the routers inside `model` from `__enter__` to `__exit__`.

    Args:
        model: any module that holds routers.
        folder: is created; refused if it holds a trace already.
        rows_per_file: rows in memory before they are written.

    Raises:
        ValueError: for a model without routers or a folder with a trace.
    """

    def __init__(self, model: nn.Module, folder: Path, *, rows_per_file: int = 1_000_000):
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        if not self.routers:
            raise ValueError(f"{type(model).__name__} holds no router: there is nothing to trace")
        if any(folder.glob(PATTERN)):
            raise ValueError(f"{folder} holds a trace already")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows_per_file = folder, rows_per_file
        self._parts: list[dict[str, np.ndarray]] = []
        self._n_rows = self._n_files = 0
        self._forwards: defaultdict[int, int] = defaultdict(int)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RouterTrace":
        self._hooks = [router.register_forward_hook(self._record) for router in self.routers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unhook()
        self._write()

    def unhook(self) -> None:
        """From here on only `add` records: a decode step that nobody listens to may be one call."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _record(self, router: nn.Module, arguments: tuple[object, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        if not _unrecorded.get():
            self.add(router, routing)

    def add(self, router: Router, routing: Routing) -> None:
        """Records one forward of one router."""
        rows, layer = routing.assignments, router.layer_index
        n_rows = int(rows.expert_offsets[-1])
        part = {
            "layer": np.full(n_rows, layer, np.int32),
            "forward": np.full(n_rows, self._forwards[layer], np.int32),
            "token": rows.token_N[:n_rows].cpu().numpy().astype(np.int32),
            "expert": rows.expert_N[:n_rows].cpu().numpy().astype(np.int32),
            "weight": rows.weight_N[:n_rows].detach().float().cpu().numpy(),
        }
        self._forwards[layer] += 1
        self._parts.append(part)
        self._n_rows += n_rows
        if self._n_rows >= self.rows_per_file:
            self._write()

    def _write(self) -> None:
        if not self._parts:
            return
        columns: dict[str, Any] = {name: np.concatenate([part[name] for part in self._parts]) for name in COLUMNS}
        packed = io.BytesIO()
        np.savez_compressed(packed, **columns)
        write_bytes(self.folder / PATTERN.replace("*", f"{self._n_files:05d}"), packed.getvalue())
        self._n_files += 1
        self._parts, self._n_rows = [], 0


def read_trace(folder: Path) -> TracedRows:
    """All rows that a RouterTrace wrote.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise ValueError(f"{folder} holds no trace ({PATTERN})")
    archives = [np.load(file, allow_pickle=False) for file in files]
    return TracedRows(**{name: np.concatenate([archive[name] for archive in archives]) for name in COLUMNS})
