"""The same views of a text in C, where the machine has a compiler: several times as fast, and bit for bit the same.

Every function here gives what its numpy form gives beside its caller, or None where there is no library.

Legend: C characters, G n-grams, H hashes, W words.
"""

import functools
from collections.abc import Callable
from ctypes import CDLL, c_char, c_double, c_float, c_int, c_long, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from foundation.c_library import c_library

P = c_void_p
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "kinds": (None, [P, c_long, P, P, P]),
    "runs": (c_long, [P, P, c_long, c_int, P, c_uint64, P, P, P]),
    "runs_with": (c_long, [P, P, P, c_long, c_int]),
    "whole": (c_uint64, [P, c_long, c_uint64]),
    "gated_lines": (c_long, [P, c_long, P, P]),
    "run_sums": (None, [P, c_long, c_uint64, P]),
    "listed": (c_long, [P, P, P, c_long, P, c_uint64, P, c_long, P, c_long, P, P]),
    "units": (c_long, [P, P, c_long, c_long, P, P, P]),
    "repeated_share": (c_double, [P, P, P, c_long, c_long, c_int, c_double, P]),
    "bands": (None, [P, P, c_long, c_long, P, P, c_long, c_long, P, P]),
    "walk": (c_long, [P, c_long, P, P, P, P, P]),
    "character_sums": (None, [P, c_long, c_uint64, P]),
    "ngram_probabilities": (None, [P, P, c_long, P, c_long, c_int, c_float, c_float, P]),
}
WORDS, CHINESE_WORDS, TERMS = range(3)
# Where an array's values lie, as an argument of C: a quarter of what `array.ctypes` takes, of which a text needs
# seventy. An array that is not in one piece, or not to be written, is refused.
_at: Callable[[np.ndarray], Any] = (c_char * 0).from_buffer  # pyright: ignore[reportAssignmentType]


@functools.cache
def _library() -> CDLL | None:
    # Contracted products round otherwise than numpy does.
    return c_library([Path(__file__).with_name("views.c")], SIGNATURES, flags=["-ffp-contract=off"]).library


def kinds_and_counts(codes_C: np.ndarray, table: np.ndarray, n_kinds: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of every character its kind, uint8, and how many there are of each, int64."""
    if (library := _library()) is None:
        return None
    kinds_C, counts = np.empty(len(codes_C), np.uint8), np.empty(n_kinds, np.int64)
    library.kinds(_at(codes_C), len(codes_C), _at(table), _at(kinds_C), _at(counts))
    return kinds_C, counts


def runs(
    codes_C: np.ndarray, kinds_C: np.ndarray, form: int, lower: np.ndarray, inverse: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Starts, ends and hashes of words, Chinese words or terms."""
    if (library := _library()) is None:
        return None
    n = len(codes_C)
    starts, ends, hashes = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.uint64)
    inputs = _at(codes_C), _at(kinds_C), n, form, _at(lower), inverse
    count = library.runs(*inputs, _at(starts), _at(ends), _at(hashes))
    return starts[:count], ends[:count], hashes[:count]


def runs_with(kinds_C: np.ndarray, starts: np.ndarray, ends: np.ndarray, kind: int) -> int | None:
    """How many runs have a character of a kind."""
    if (library := _library()) is None:
        return None
    assert starts.dtype == ends.dtype == np.int64
    return library.runs_with(_at(kinds_C), _at(starts), _at(ends), len(starts), kind)


def whole(codes_C: np.ndarray, inverse: int) -> int | None:
    """The hash of a text as one run."""
    if (library := _library()) is None:
        return None
    return library.whole(_at(codes_C), len(codes_C), inverse)


def gated_lines(codes_C: np.ndarray) -> list[tuple[int, int]] | None:
    """See `personal_data.gated_lines`."""
    if (library := _library()) is None:
        return None
    starts, ends = np.empty(len(codes_C) // 2 + 1, np.int64), np.empty(len(codes_C) // 2 + 1, np.int64)
    count = library.gated_lines(_at(codes_C), len(codes_C), _at(starts), _at(ends))
    return list(zip(starts[:count].tolist(), ends[:count].tolist()))


def run_sums(values: np.ndarray, inverse: int) -> np.ndarray | None:
    """`RunHashes.sums` of values, uint64."""
    if (library := _library()) is None:
        return None
    # Other types would be read as what they are not.
    assert values.dtype == np.uint64
    values, sums = np.ascontiguousarray(values), np.empty(len(values) + 1, np.uint64)
    library.run_sums(_at(values), len(values), inverse, _at(sums))
    return sums


def listed(
    terms: np.ndarray, hashes: tuple[np.ndarray, np.ndarray], marks: np.ndarray, lengths: np.ndarray, values: np.ndarray
) -> np.ndarray | None:
    """Places on a list of all its runs that a text has, int64, by length and then in the order of the text.

    Args:
        terms: hashes of the text's terms.
        hashes: sums and powers of their `RunHashes`.
        marks: bool, of a length that is a power of two: what the low bits of a run's first term can be.
        lengths: that the runs have, int64.
        values: hashes of the runs, sorted.
    """
    if (library := _library()) is None:
        return None
    assert lengths.dtype == np.int64
    starts, found = np.empty(len(terms), np.int64), np.empty(len(terms) * len(lengths), np.int64)
    text = _at(terms), *(_at(part) for part in hashes), len(terms)
    runs = _at(marks), len(marks) - 1, _at(lengths), len(lengths), _at(values), len(values)
    return found[: library.listed(*text, *runs, _at(starts), _at(found))]


def units(codes_C: np.ndarray, kinds_C: np.ndarray, shortest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Paragraphs, starts and ends, int64; see `near_duplicates.units_of`."""
    if (library := _library()) is None:
        return None
    n = len(codes_C)
    found = np.empty((3, n + 1), np.int64)
    count = library.units(_at(codes_C), _at(kinds_C), n, shortest, *(_at(row) for row in found))
    paragraph_U, start_U, end_U = found[:, :count]
    return paragraph_U, start_U, end_U


def repeated_share(
    run_sums: np.ndarray, powers: np.ndarray, sums_W: np.ndarray, n: int, *, top: bool, enough: float
) -> tuple[float, int] | None:
    """`repetition.top_share`, or `repetition.duplicate_share`; and how often the commonest n-gram is there.

    Args:
        run_sums, powers: of the words' `RunHashes`.
    """
    if (library := _library()) is None:
        return None
    # Other types would be read as what they are not.
    assert run_sums.dtype == powers.dtype == np.uint64
    assert sums_W.dtype == np.int64
    most = np.zeros(1, np.int64)
    inputs = _at(run_sums), _at(powers), _at(sums_W), len(sums_W) - 1
    share = library.repeated_share(*inputs, n, top, enough, _at(most))
    return None if share < 0 else (share, int(most[0]))


def walk(
    text: bytes, next_state: np.ndarray, states: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Features that an automaton over bytes comes through, in the order of first visits, and how often, int64.

    Args:
        next_state: uint32, by row and byte.
        states: int32, of each state where its row begins, and its feature, or below 0: side by side, because every step
            waits for both.
        place: int32, -1 for each feature, before the call and behind it.
    """
    if (library := _library()) is None:
        return None
    assert next_state.dtype == np.uint32
    assert states.dtype == place.dtype == np.int32
    found, counts = np.empty(len(text), np.int64), np.empty(len(text), np.int64)
    automaton = _at(next_state), _at(states), _at(place)
    n = library.walk(text, len(text), *automaton, _at(found), _at(counts))
    return found[:n], counts[:n]


def bands(
    run_sums: np.ndarray, powers: np.ndarray, n: int, permutations: tuple[np.ndarray, np.ndarray], rows: int
) -> np.ndarray | None:
    """uint64 [H / rows]: the least of each permutation of the low halves of the n-grams' hashes, `rows` of them in one.

    Args:
        run_sums, powers: of the terms' `RunHashes`.
        permutations: factors and shifts, uint32 [H].
    """
    if (library := _library()) is None:
        return None
    factors_H, shifts_H = permutations
    least_H, found = np.empty(len(factors_H), np.uint32), np.empty(len(factors_H) // rows, np.uint64)
    inputs = _at(run_sums), _at(powers), len(run_sums) - 1, n, _at(factors_H), _at(shifts_H)
    library.bands(*inputs, len(factors_H), rows, _at(least_H), _at(found))
    return found


def character_sums(codes_C: np.ndarray, inverse: int) -> np.ndarray | None:
    """`RunHashes.sums` of the characters, every digit the same."""
    if (library := _library()) is None:
        return None
    sums = np.empty(len(codes_C) + 1, np.uint64)
    library.character_sums(_at(codes_C), len(codes_C), inverse, _at(sums))
    return sums


def ngram_probabilities(
    sums: np.ndarray, powers: np.ndarray, counts: np.ndarray, shape: tuple[int, int], floats: tuple[float, float, float]
) -> np.ndarray | None:
    """float32 [C], see `ngram_model`.

    Args:
        sums, powers: of the text's `RunHashes`.
        shape: the longest order and the bits of a slot.
        floats: the number of characters that were counted, the prior, and the uniform probability.
    """
    if (library := _library()) is None:
        return None
    (order, bits), (total, prior, uniform) = shape, floats
    assert order < 16
    assert counts.dtype == np.uint16
    assert counts.flags.c_contiguous
    p_C = np.full(len(sums) - 1, uniform, np.float32)
    inputs = _at(sums), _at(powers), len(p_C), _at(counts), order, bits
    library.ngram_probabilities(*inputs, total, prior, _at(p_C))
    return p_C
