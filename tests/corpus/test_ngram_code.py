"""The n-gram code against one that keeps its counts in tables, and against a coder that writes and reads it."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.compressors import ngram_bits_per_byte, xz_bits_per_byte
from corpus.ngram_code import DISCOUNT, code_lengths
from lm.arithmetic_coding import PRECISION, RangeDecoder, RangeEncoder


class Tables:
    """The same model, one symbol after the other."""

    def __init__(self, alphabet, order):
        self.alphabet, self.order = alphabet, order
        self.counts = defaultdict(lambda: defaultdict(int))
        self.past = [0] * order

    def contexts(self):
        past = tuple(self.past)
        return [past[len(past) - k :] for k in range(self.order + 1)]

    def p(self, symbol):
        p = 1 / self.alphabet
        for context in self.contexts():
            seen = self.counts[context]
            if n := sum(seen.values()):
                p = (max(seen[symbol] - DISCOUNT, 0) + DISCOUNT * sum(map(bool, seen.values())) * p) / n
        return p

    def see(self, symbol, learn=True):
        for context in reversed(self.contexts() if learn else []):
            self.counts[context][symbol] += 1
            if self.counts[context][symbol] > 1:
                break
        self.past = [*self.past, symbol][1:] if self.order else []


symbols_of = st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(0, n), min_size=1, max_size=60))


@settings(deadline=None, max_examples=60)
@given(symbols=symbols_of, order=st.integers(0, 4), data=st.data())
def test_it_is_the_model_that_tables_give(symbols, order, data):
    learnt = data.draw(st.lists(st.booleans(), min_size=len(symbols), max_size=len(symbols)))
    tables, expected = Tables(7, order), []
    for symbol, learn in zip(symbols, learnt):
        expected.append(-np.log2(tables.p(symbol)))
        assert sum(map(tables.p, range(7))) == pytest.approx(1)
        tables.see(symbol, learn)
    found = code_lengths(np.array(symbols), alphabet=7, order=order, learnt_N=np.array(learnt))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_an_arithmetic_coder_needs_as_many_bits_and_reads_them_back():
    alphabet, order = 8, 3
    text = [symbol % alphabet for symbol in b"the cat sat on the mat, and the cat ate the rat. " * 5]

    def starts(tables):
        p = [tables.p(symbol) for symbol in range(alphabet)]
        sizes = np.maximum(np.floor(np.array(p) * ((1 << PRECISION) - alphabet)).astype(np.int64), 1)
        sizes[np.argmax(sizes)] += (1 << PRECISION) - sizes.sum()
        return np.concatenate(([0], np.cumsum(sizes)))

    coder, tables = RangeEncoder(), Tables(alphabet, order)
    for symbol in text:
        at = starts(tables)
        coder.encode(int(at[symbol]), int(at[symbol + 1] - at[symbol]))
        tables.see(symbol)
    code = coder.finish()
    bits = code_lengths(np.array(text), alphabet=alphabet, order=order).sum()
    assert abs(8 * len(code) - bits) < 16
    decoder, tables = RangeDecoder(code), Tables(alphabet, order)
    for symbol in text:
        at = starts(tables)
        assert np.searchsorted(at, decoder.target(), side="right") - 1 == symbol
        decoder.decode(int(at[symbol]), int(at[symbol + 1] - at[symbol]))
        tables.see(symbol)


def test_what_was_learnt_from_like_text_helps():
    learnt = np.frombuffer(b"import os\nimport sys\nimport json\n" * 20, np.uint8)
    text = np.frombuffer(b"import re\n", np.uint8)
    both = np.concatenate((learnt, text))
    mask = np.arange(len(both)) < len(learnt)
    bits = code_lengths(both, alphabet=256, order=5, learnt_N=mask)[len(learnt) :].sum()
    assert bits < 0.5 * code_lengths(text, alphabet=256, order=5).sum()


def test_bits_per_byte_of_a_text_in_blocks():
    text = b"never odd or even, " * 200
    whole = ngram_bits_per_byte(text)
    assert 0 < whole < 0.5
    assert ngram_bits_per_byte(text, block=len(text) // 2) == pytest.approx(2 * whole, rel=0.3)
    assert xz_bits_per_byte(text) > 0
    with pytest.raises(ValueError, match="no bytes"):
        ngram_bits_per_byte(b"")


def test_a_sequence_too_long_to_sort_is_refused():
    with pytest.raises(ValueError, match="too many"):
        code_lengths(np.zeros(1 << 10, np.int64), alphabet=1 << 45, order=1)
