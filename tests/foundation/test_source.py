"""A file's fingerprint follows what it says and nothing else; a module's code is what it imports, wherever."""

import shutil

import pytest

from foundation import source

FILE = '''"""A docstring."""

import numpy


class A:
    """What it is."""

    def f(self, x):
        """What it does."""
        # Why.
        return x * 2  # and how
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own, read anew by every `code_of`."""
    root = tmp_path / "checkout"
    files = {
        "below/__init__.py": "",
        "below/a.py": FILE,
        "below/b.py": "x = 1\n",
        "below/native.c": "int x;\n",
        "above/__init__.py": "",
        "above/top.py": "from below import a\n\n\ndef later():\n    import above.lazy\n",
        "above/lazy.py": "import below.a\n",
        "above/apart.py": "from below.b import x\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(source, "ROOT", root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield root
    forget()


def forget():
    for read in (source.code_of, source.file_code, source._kept):
        read.cache_clear()


def code_after(path, text):
    path.write_text(text)
    forget()
    return source.code_of(("above.top",))


def test_code_is_what_is_imported_at_the_top_or_later(checkout):
    assert set(source.code_of(("above.top",))) == {
        "above/__init__.py",
        "above/top.py",
        "above/lazy.py",
        "below/__init__.py",
        "below/a.py",
        "below/native.c",
    }
    assert "below/b.py" in source.code_of(("above.apart",))


def test_words_change_nothing_and_meaning_does(checkout):
    path = checkout / "below" / "a.py"
    before = source.code_of(("above.top",))
    for same in (
        FILE.replace("A docstring", "Another"),
        FILE.replace("What it is", "Another"),
        FILE.replace("What it does", "Another"),
        FILE.replace('"""A docstring."""\n\n', ""),
        FILE.replace("# Why.", "# Why not.").replace("  # and how", ""),
        FILE.replace("x * 2", "(\n            x\n            * 2\n        )"),
    ):
        assert code_after(path, same) == before
    for other in (FILE.replace("2", "3"), FILE.replace("*", "+"), FILE.replace("def f", "async def f")):
        after = code_after(path, other)
        assert {name for name in before if before[name] != after[name]} == {"below/a.py"}
    assert code_after(path, FILE) == before
    after = code_after(checkout / "below" / "native.c", "int x; // why\n")
    assert {name for name in before if before[name] != after[name]} == {"below/native.c"}


def test_what_was_read_once_is_not_parsed_again(checkout, monkeypatch):
    before = source.code_of(("above.top",))
    forget()
    with monkeypatch.context() as patched:
        patched.setattr("ast.parse", lambda *_, **__: pytest.fail("parsed again"))
        assert source.code_of(("above.top",)) == before
    # A cache that cannot be read, or written, costs time only.
    (kept,) = source.user_cache().iterdir()
    for spoil in (lambda: kept.write_text("{"), lambda: (shutil.rmtree(source.user_cache()), kept.parent.touch())):
        spoil()
        forget()
        assert source.code_of(("above.top",)) == before
