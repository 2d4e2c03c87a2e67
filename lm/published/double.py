"""Models that ask for fp32 by name, run in fp64: what both sides round is measured against it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Doubled(TorchFunctionMode):
    """Whoever asks for fp32 gets fp64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*given, **named)


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Inside, casts to fp32 and new tensors of it are fp64; parameters are what they are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)
