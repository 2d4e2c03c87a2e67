"""One choice for the whole test process, made before anything imports Triton: kernels are interpreted (see
tests/triton_kernels/conftest.py).

Triton's own library functions (cumsum, say) are fixed as compiled or interpreted when `triton` is imported, which other
parts of torch do on their own: a conftest further down would come too late.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a C compiler: torch computes everything."""
    from triton_kernels.native import library

    monkeypatch.setattr(library, "native", lambda: library.Native(None, "switched off"))
