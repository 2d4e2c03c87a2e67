"""`<out>/gate/ledger.json`: every question that gates were asked, because their number decides how sure a verdict must
be.

A question is a method as its file and its training code are now, with margin, error and looks. Asked again it is the
same try, under its number and with its threshold; a changed line of the method, another margin or more seeds make
another. Tries are counted by trunk: their methods branch from the same weights and are measured on the same text, so
their luck is shared.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ablations.gate.decision import Answer
from foundation.files import CorruptFileError, read_sealed, write_sealed
from foundation.serialize import from_dict, to_dict
from staged_training.record import locked

LEDGER_FILE = "ledger.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Try:
    """One question.

    Attributes:
        number: among those on the same trunk, from 1.
        trunk: hash of the first trunk.
        question: hash of everything that makes it another question.
        seeds: that it may train.
        answer: None until there is one.
    """

    number: int
    trunk: str
    question: str
    method: str
    margin: float
    error: float
    seeds: int
    commit: str
    answer: Answer | None = None


def enter(out: Path, new: Try) -> Try:
    """The try of a question: the one that was entered when it was first asked, or `new` under the next number.

    Raises:
        CorruptFileError: for a ledger that is not as it was written.
    """
    with _ledger(out) as folder:
        tries = read_tries(folder)
        own = [known for known in tries if known.trunk == new.trunk]
        for known in own:
            if known.question == new.question:
                return known
        new = dataclasses.replace(new, number=len(own) + 1)
        _write(folder, [*tries, new])
        return new


def answer(out: Path, asked: Try, given: Answer) -> None:
    """Notes what came of a try."""
    with _ledger(out) as folder:
        _write(
            folder,
            [
                dataclasses.replace(known, answer=given)
                if (known.trunk, known.question) == (asked.trunk, asked.question)
                else known
                for known in read_tries(folder)
            ],
        )


def read_tries(folder: Path) -> list[Try]:
    """All tries that a ledger's folder knows, in their order; none where there is no ledger yet."""
    path = folder / LEDGER_FILE
    if not path.exists():
        return []
    try:
        return [from_dict(Try, entry, place=str(path)) for entry in read_sealed(path)["tries"]]
    except CorruptFileError as error:
        raise CorruptFileError(
            f"{folder}: {error}; how many tries there were is part of every verdict, so it is not begun anew"
        ) from None


@contextlib.contextmanager
def _ledger(out: Path) -> Iterator[Path]:
    """The ledger's folder, made where it is missing, for one process at a time."""
    folder = out / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        yield folder


def _write(folder: Path, tries: list[Try]) -> None:
    write_sealed(folder / LEDGER_FILE, {"tries": [to_dict(entry) for entry in tries]})
