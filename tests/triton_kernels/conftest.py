"""How kernels are tested on a CPU.

Triton decides between compiling and interpreting when a `@triton.jit` function is *defined*, by TRITON_INTERPRET in the
environment, so one process can do only one of the two. The choice here: the whole pytest process interprets
(`tests/conftest.py` sets the variable). Kernel modules (those that hold `@triton.jit` functions) are imported only
inside the function that launches them. Tests that compile (the offline gate) start a subprocess without the variable:
`compile_environment` is its environment.

Every `torch.empty` is filled with NaN meanwhile, so that a row a kernel forgot to write cannot look right by luck.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from triton_kernels.linear import chunks_torch


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """torch.empty returns NaN (torch.utils.deterministic.fill_uninitialized_memory) as long as deterministic algorithms
    are on; so does the scratch memory of the torch forms, which every test gets anew."""
    chunks_torch._of_thread.__dict__.clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compile_environment() -> dict[str, str]:
    """The environment of a subprocess in which kernels are compiled rather than interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
