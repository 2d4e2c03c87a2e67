"""What holds for the whole test process: kernels are interpreted (see tests/triton_kernels/conftest.py), and at no more
than they cost; stop signals are heard; the longest tests come first.

Triton's own library functions (cumsum, say) are fixed as compiled or interpreted when `triton` is imported, which other
parts of torch do on their own: a conftest further down would come too late.
"""

import importlib.util
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

os.environ["TRITON_INTERPRET"] = "1"

# In the background of a script, or under nohup, a process is born deaf to these signals, and so are those that it
# starts. Tests that send them to a command, or to this process, send them to one that somebody started from a terminal.
for number, heard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, heard)

# No test is about time, and on a busy machine any of them may take a minute.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long test that begins last leaves the other cores idle until it ends."""
    items.sort(key=lambda item: "unchanged" not in item.path.parts)


@pytest.fixture
def forked():
    """Commands are forked from this process, see tests/forked.py."""
    # Torch is imported behind the choice above.
    from tests.forked import forking

    with forking():
        yield


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a C compiler: torch computes everything."""
    from triton_kernels.native import library

    monkeypatch.setattr(library, "native", lambda: library.Compiled(None, "switched off"))


def quicken_the_interpreter() -> None:
    """Two thirds of an interpreted kernel's time are three things that Triton does over and over.

    Every launch and every call of a device function, `tl.sum` and `tl.cdiv` among them, patches Triton's language once
    more, and every launch takes that back: this process interprets, so what one module's globals name stays patched.
    Every sum of integers is interpreted a second time in int64, to see that it does not overflow: numpy sees the same
    at once. And the table of numpy's types is built anew for each lookup.
    """
    import numpy as np
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            # The globals, so that no others are taken for them.
            patched[id(fn.__globals__)] = fn.__globals__
            patch(fn)._changes.clear()
        return interpreter._LangPatchScope()

    type_anew, types = interpreter._get_np_dtype, {}

    def type_of(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = type_anew(dtype.scalar)
        return types[name]

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def refuse_overflow(lhs, rhs, binary_op):
        scalar = lhs.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        message = f"{binary_op.__name__}: int{scalar.int_bitwidth} overflow"
        result = exact[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        assert scalar.get_int_min_value() <= result.min(), message
        assert result.max() <= scalar.get_int_max_value(), message

    interpreter._patch_lang = patch_once
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = refuse_overflow
    interpreter._get_np_dtype = type_of


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    # There is no Triton for macOS.
    if importlib.util.find_spec("triton"):
        quicken_the_interpreter()
