"""64-bit hashes of runs in a sequence, all of them at once.

A run's hash is a polynomial in an odd base modulo 2^64, where odd numbers have inverses: with prefix sums of
value_j x base^-j, any run's hash is one subtraction and one product, wherever it begins. So the words of a text, its
n-grams of every length and its paragraphs come from one pass each.

Legend: C values of the sequence, R runs.
"""

import numpy as np

from corpus.refine import views

BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)
_powers: dict[int, np.ndarray] = {}


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose bits all depend on all bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def powers(base: int, count: int) -> np.ndarray:
    """base^0 ... base^(count - 1) modulo 2^64; kept, and longer than asked for, because texts come one by one."""
    found = _powers.get(base)
    if found is None or len(found) < count:
        steps = np.full(max(1 << 14, 2 * count), base, np.uint64)
        steps[0] = 1
        found = _powers[base] = np.cumprod(steps, dtype=np.uint64)
    return found[:count]


class RunHashes:
    """Hashes of runs of `values_C` (uint64, whose bits should be mixed).

    Attributes:
        sums, powers: of value_j x base^-j before each place, and of the base; uint64 [C + 1].
    """

    def __init__(self, values_C: np.ndarray):
        if (sums := views.run_sums(values_C, INVERSE)) is None:
            sums = np.zeros(len(values_C) + 1, np.uint64)
            np.cumsum(values_C * powers(INVERSE, len(values_C)), out=sums[1:])
        self.sums = sums
        self.powers = powers(BASE, len(values_C) + 1)

    @classmethod
    def of_sums(cls, sums: np.ndarray) -> "RunHashes":
        """Of sums that are known."""
        found = cls(np.empty(0, np.uint64))
        found.sums, found.powers = sums, powers(BASE, len(sums))
        return found

    def of(self, starts_R: np.ndarray, ends_R: np.ndarray) -> np.ndarray:
        """uint64 [R]: equal for equal runs; of different ones, equal by chance of about 2^-64 each."""
        return mix((self.sums[ends_R] - self.sums[starts_R]) * self.powers[starts_R] + lengths(starts_R, ends_R))

    def ngrams(self, n: int) -> np.ndarray:
        """Hashes of the n-grams, in order; none where the sequence is shorter."""
        return mix(self.polynomials(n) + np.uint64(n))

    def polynomials(self, n: int) -> np.ndarray:
        """Of the n-grams; their high bits are as good as mixed."""
        if len(self.sums) <= n:
            return np.empty(0, np.uint64)
        return (self.sums[n:] - self.sums[:-n]) * self.powers[: len(self.sums) - n]


def lengths(starts_R: np.ndarray, ends_R: np.ndarray) -> np.ndarray:
    # A value of 0 would add nothing to a polynomial; the length tells such runs apart.
    return (ends_R - starts_R).astype(np.uint64)


def code_points(text: str) -> np.ndarray:
    """uint32, of surrogates as of other characters; to be written as well, as `views` asks."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").copy()


def text_hash(text: str) -> int:
    """The 64-bit hash of a whole text, code points as they are: decides where chance would."""
    codes_C = code_points(text)
    if (found := views.whole(codes_C, INVERSE)) is not None:
        return found
    hashes = RunHashes(mix(codes_C.astype(np.uint64)))
    return int(hashes.of(np.array([0]), np.array([len(codes_C)]))[0])
