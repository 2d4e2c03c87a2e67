"""One choice for the whole test process, made before anything imports Triton: kernels are interpreted (see
tests/triton_kernels/conftest.py), and at no more than they cost.

Triton's own library functions (cumsum, say) are fixed as compiled or interpreted when `triton` is imported, which other
parts of torch do on their own: a conftest further down would come too late.
"""

import importlib.util
import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a C compiler: torch computes everything."""
    from triton_kernels.native import library

    monkeypatch.setattr(library, "native", lambda: library.Native(None, "switched off"))


def quicken_the_interpreter() -> None:
    """Half of an interpreted kernel's time is that every call of a device function, `tl.sum` and `tl.cdiv` among them,
    patches Triton's language once more. What one module's globals name stays patched until the launch takes it back."""
    from triton.runtime import interpreter

    patch, restore, patched = interpreter._patch_lang, interpreter._LangPatchScope.restore, set()

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def restore_and_forget(scope):
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_and_forget


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    # There is no Triton for macOS.
    if importlib.util.find_spec("triton"):
        quicken_the_interpreter()
