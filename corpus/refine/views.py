"""The same views of a text in C, where the machine has a compiler: several times as fast, and bit for bit the same.

Every function here gives what its numpy form gives beside its caller, or None where there is no library.

Legend: C characters, G n-grams, H hashes, W words.
"""

import functools
from ctypes import CDLL, c_double, c_float, c_int, c_long, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from foundation.c_library import c_library

P = c_void_p
SIGNATURES: dict[str, tuple[type, list[type]]] = {
    "kinds": (c_int, [P, c_long, P, P, P]),
    "runs": (c_long, [P, P, c_long, c_int, P, c_uint64, P, P, P]),
    "whole": (c_uint64, [P, c_long, c_uint64]),
    "gates": (c_int, [P, c_long]),
    "repeated_share": (c_double, [P, P, c_long, c_long, c_int, c_double]),
    "minhash": (c_int, [P, c_long, P, P, c_long, P]),
    "walk": (c_long, [P, c_long, P, P, P, P, P, P]),
    "ngram_probabilities": (c_int, [P, P, c_long, P, c_long, c_int, c_float, c_float, P]),
}
WORDS, CHINESE_WORDS, TERMS = range(3)
# Of `gates`, in the order of `personal_data`'s forms.
GATES = (1, 2, 4, 8)


@functools.cache
def _library() -> CDLL | None:
    # Contracted products round otherwise than numpy does.
    return c_library([Path(__file__).with_name("views.c")], SIGNATURES, flags=["-ffp-contract=off"]).library


def kinds_and_counts(codes_C: np.ndarray, table: np.ndarray, n_kinds: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of every character its kind, uint8, and how many there are of each, int64."""
    if (library := _library()) is None:
        return None
    kinds_C, counts = np.empty(len(codes_C), np.uint8), np.empty(n_kinds, np.int64)
    library.kinds(codes_C.ctypes.data, len(codes_C), table.ctypes.data, kinds_C.ctypes.data, counts.ctypes.data)
    return kinds_C, counts


def runs(
    codes_C: np.ndarray, kinds_C: np.ndarray, form: int, lower: np.ndarray, inverse: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Starts, ends and hashes of words, Chinese words or terms."""
    if (library := _library()) is None:
        return None
    n = len(codes_C)
    starts, ends, hashes = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.uint64)
    inputs = codes_C.ctypes.data, kinds_C.ctypes.data, n, form, lower.ctypes.data, inverse
    count = library.runs(*inputs, starts.ctypes.data, ends.ctypes.data, hashes.ctypes.data)
    return starts[:count].copy(), ends[:count].copy(), hashes[:count].copy()


def whole(codes_C: np.ndarray, inverse: int) -> int | None:
    """The hash of a text as one run."""
    if (library := _library()) is None:
        return None
    return library.whole(codes_C.ctypes.data, len(codes_C), inverse)


def gates(codes_C: np.ndarray) -> int | None:
    """Which of `GATES` a text has."""
    if (library := _library()) is None:
        return None
    return library.gates(codes_C.ctypes.data, len(codes_C))


def repeated_share(polynomials_G: np.ndarray, sums_W: np.ndarray, n: int, *, top: bool, enough: float) -> float | None:
    """`repetition.top_share`, or `repetition.duplicate_share`."""
    if (library := _library()) is None:
        return None
    # Other types would be read as what they are not.
    assert polynomials_G.dtype == np.uint64
    assert sums_W.dtype == np.int64
    polynomials_G = np.ascontiguousarray(polynomials_G)
    share = library.repeated_share(polynomials_G.ctypes.data, sums_W.ctypes.data, len(sums_W) - 1, n, top, enough)
    return None if share < 0 else share


def walk(
    text: bytes, next_state: np.ndarray, row: np.ndarray, feature: np.ndarray, place: np.ndarray
) -> dict[int, int] | None:
    """How often an automaton over bytes comes through each feature, in the order of first visits.

    Args:
        next_state: uint32, by row and byte.
        row: int32, where each state's row begins.
        feature: int32, of each state, or below 0.
        place: int32, -1 for each feature, before the call and behind it.
    """
    if (library := _library()) is None:
        return None
    assert next_state.dtype == np.uint32
    assert row.dtype == feature.dtype == place.dtype == np.int32
    found, counts = np.empty(len(text), np.int64), np.empty(len(text), np.int64)
    automaton = next_state.ctypes.data, row.ctypes.data, feature.ctypes.data, place.ctypes.data
    n = library.walk(text, len(text), *automaton, found.ctypes.data, counts.ctypes.data)
    return dict(zip(found[:n].tolist(), counts[:n].tolist()))


def minhash(hashes_G: np.ndarray, factors_H: np.ndarray, shifts_H: np.ndarray) -> np.ndarray | None:
    """uint32 [H]: the least of each permutation of the low halves of the hashes."""
    if (library := _library()) is None:
        return None
    least_H = np.full(len(factors_H), np.iinfo(np.uint32).max, np.uint32)
    permutations = factors_H.ctypes.data, shifts_H.ctypes.data, len(factors_H)
    library.minhash(hashes_G.ctypes.data, len(hashes_G), *permutations, least_H.ctypes.data)
    return least_H


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
    inputs = sums.ctypes.data, powers.ctypes.data, len(p_C), counts.ctypes.data, order, bits
    library.ngram_probabilities(*inputs, total, prior, p_C.ctypes.data)
    return p_C
