"""The views of a text in C against their numpy forms: the same bits, whatever the text."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.refine import views
from corpus.refine.hashing import RunHashes, text_hash
from corpus.refine.language import identifier
from corpus.refine.lines import furniture
from corpus.refine.near_duplicates import _units, bands_of
from corpus.refine.ngram_model import NgramModel
from corpus.refine.page import CHINESE, ENGLISH, Page
from corpus.refine.personal_data import PersonalData, gated_lines, mask
from corpus.refine.ratios import words_with_a_letter
from corpus.refine.repetition import duplicate_share, top_share

pytestmark = pytest.mark.skipif(views._library() is None, reason="this machine has no C compiler")

# Of every kind of character, and of what the forms of personal data are made of.
ALPHABET = "aAé中文あ한0１9 .:@()/-\n\r\t#…\ufffd\u0001😀𠮷ﾁ\x85"
texts = st.text(alphabet=ALPHABET, max_size=200) | st.text(max_size=60).filter(lambda text: text.isprintable())


def in_numpy(monkeypatch):
    monkeypatch.setattr(views, "_library", lambda: None)


@settings(deadline=None, max_examples=80)
@given(text=texts, language=st.sampled_from([ENGLISH, CHINESE]))
def test_views_of_a_page(text, language):
    def seen():
        page = Page(text, language=language)
        parts = [page.kinds_C, *page.words, *page.terms, bands_of(page)]
        return [part.tolist() for part in parts], page.counts, text_hash(text), words_with_a_letter(page)

    fast = seen()
    with pytest.MonkeyPatch.context() as patch:
        in_numpy(patch)
        assert seen() == fast


@settings(deadline=None, max_examples=80)
@given(words=st.lists(st.integers(0, 3), max_size=60), n=st.integers(1, 6), enough=st.sampled_from([0.0, 0.1, 0.5]))
def test_shares_of_what_repeats(words, n, enough):
    hashes = RunHashes((np.array(words, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    sums = np.concatenate(([0], np.cumsum(np.array(words, np.int64) + 1)))
    fast = top_share(hashes, sums, n, enough), duplicate_share(hashes, sums, n, enough)
    with pytest.MonkeyPatch.context() as patch:
        in_numpy(patch)
        assert (top_share(hashes, sums, n, enough), duplicate_share(hashes, sums, n, enough)) == fast


@settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet="0123.:@ -()/aFx\n中", max_size=60))
def test_lines_are_looked_at_where_a_gate_opens(text):
    assert views.gated_lines(Page(text).codes_C) == gated_lines(text)


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.sampled_from(["a@b.cc", "8.8.8.8", " 212-555-0100", "x", "\n", "\r\n", "中", "2001:db8::1"])))
def test_masking_the_lines_that_a_gate_opens_is_masking_the_text(text):
    text = "".join(text)
    expected = "".join(mask(line)[0] for line in re.findall(r"[^\n]*\n|[^\n]+$", text))
    assert mask(text)[0] == expected
    assert mask(text, views.gated_lines(Page(text).codes_C)) == mask(text)


@settings(deadline=None, max_examples=100)
@given(words=st.lists(st.sampled_from(["moon", "green", "cheese", "cake"]), max_size=12))
def test_entries_of_a_list(words, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "words.txt"
    path.write_text("2 moon\n3 green cheese\n0.1 cheese cake moon\n0.7 cake\n")
    layer, page = PersonalData(path), Page(" ".join(words))
    fast = layer._unsafe(page)
    text = f" {page.text} "
    assert fast[1] == sum(f" {entry} " in text for entry in ("moon", "green cheese", "cheese cake moon", "cake"))
    with pytest.MonkeyPatch.context() as patch:
        in_numpy(patch)
        assert layer._unsafe(Page(page.text)) == fast


# Sentences and paragraphs, in every dress that a line end has.
pieces = st.sampled_from(
    ["a", "中", ".", "。", "!”", "…)", " ", "\n", "\r\n", "\r", "\n\n", "\u2028", "\ufeff", "\x0b"]
)


@settings(deadline=None, max_examples=400)
@given(text=st.lists(pieces, max_size=40).map("".join), shortest=st.integers(1, 6))
def test_paragraphs_and_spans_of_sentences(text, shortest):
    page = Page(text)
    found = views.units(page.codes_C, page.kinds_C, shortest)
    assert [part.tolist() for part in found] == _units(text, shortest).tolist()


@settings(deadline=None, max_examples=8)
@given(text=st.text(alphabet="abc 中09", min_size=1, max_size=150), order=st.integers(1, 6))
def test_probabilities_of_an_ngram_model(text, order):
    model = NgramModel.train(["abcabc abc 中文 0"] * 3, order)
    fast = model.bits_per_character(text)
    with pytest.MonkeyPatch.context() as patch:
        in_numpy(patch)
        assert model.bits_per_character(text) == fast


@pytest.mark.parametrize("text", ["The cat sat on the mat.", "Der Hund läuft schnell.", "中文文本", "", "\x00\x01"])
def test_languages(text, monkeypatch):
    fast = identifier().classify(text)
    in_numpy(monkeypatch)
    assert identifier().classify(text) == fast
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify(text) == fast


def test_page_furniture_is_found_by_whole_lines():
    lines = ["Read more", "  Sign in  ", "a text to read more of", "©2020 by us", "", "12 comments", "x" * 300, "登录"]
    assert furniture(Page("\n".join(lines))) == {0, 1, 3, 5, 7}
    assert furniture(Page("\r\n".join(lines))) == {0, 1, 3, 5, 7}
    # Too long before it is stripped.
    assert furniture(Page("Read more" + " " * 300)) == set()
