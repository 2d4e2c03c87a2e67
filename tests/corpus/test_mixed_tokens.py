"""Mixtures of a packed stream, and the shares that people ask for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.mixed_tokens import MixedTokens
from corpus.packing import pack
from corpus.shares import capped, read_shares

BOUNDARY = 0
# Of token ids below 100; a document of domain d is made of d + 1 alone.
BYTES_V = np.arange(100) % 7
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    draw = np.random.default_rng(0)
    domain_D = draw.integers(0, 3, 60)
    documents = [([int(domain) + 1] * int(draw.integers(0, 30)), 1) for domain in domain_D]
    folder = tmp_path_factory.mktemp("packed") / "p"
    return pack(folder, documents, vocab_size=100, boundary_id=BOUNDARY, shard_tokens=100), domain_D


def mixed(packed, shares, length):
    stream, domain_D = packed
    return MixedTokens(stream, domain_D, dict(zip(NAMES, shares)), length=length, n_bytes_V=BYTES_V)


shares_of = st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any).map(lambda n: [x / sum(n) for x in n])


@settings(deadline=None, max_examples=60)
@given(shares=shares_of, length=st.integers(1, 5000), data=st.data())
def test_every_stretch_keeps_to_the_shares(packed, shares, length, data):
    mixture = mixed(packed, shares, length)
    stream = mixture[:]
    assert len(stream) == len(mixture) == length
    assert mixture.n_bytes == BYTES_V[stream].sum()
    for start, end in zip(mixture.document_offsets[:-1], mixture.document_offsets[1:]):
        # Whole documents, each behind its boundary; the last one is cut.
        assert stream[start] == BOUNDARY
        assert len(set(stream[start + 1 : end].tolist()) - {BOUNDARY}) <= 1
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    assert mixture[start:stop].tolist() == stream[start:stop].tolist()
    assert mixture.window(start, stop - start).tolist() == stream[start:stop].tolist()
    # Up to any place, what a domain has is off by no more than a document of each.
    longest = 30
    for domain, share in enumerate(shares):
        assert abs(mixture.use[domain].tokens - share * length) <= 3 * longest
        if share == 0:
            assert domain + 1 not in stream
    assert sum(use.tokens for use in mixture.use) == length


@settings(deadline=None, max_examples=20)
@given(shares=shares_of, length=st.integers(1, 3000), more=st.integers(1, 3000))
def test_a_longer_mixture_begins_like_a_shorter(packed, shares, length, more):
    assert mixed(packed, shares, length + more)[:length].tolist() == mixed(packed, shares, length)[:].tolist()


def test_every_pass_reads_every_document_once_and_in_another_order(packed):
    stream, domain_D = packed
    own = int(np.diff(stream.document_offsets)[domain_D == 1].sum())
    mixture = mixed(packed, (0, 1, 0), 3 * own)
    lengths = np.diff(mixture.document_offsets)
    passes = lengths.reshape(3, -1)
    assert (np.sort(passes, axis=1) == np.sort(passes[0])).all()
    assert (passes[0] != passes[1]).any()
    assert mixture.use[1].passes == 3


def test_the_fingerprint_says_what_is_read(packed):
    same = mixed(packed, (0.5, 0.5, 0), 500).fingerprint()
    assert mixed(packed, (0.5, 0.5, 0), 500).fingerprint() == same
    assert mixed(packed, (0.5, 0.4, 0.1), 500).fingerprint() != same
    assert mixed(packed, (0.5, 0.5, 0), 501).fingerprint() != same


def test_shares_are_read_from_words_numbers_and_files(tmp_path):
    tokens = {"code": 100, "prose": 400}
    assert read_shares("natural", tokens) == {"code": 0.2, "prose": 0.8}
    assert read_shares("uniform", tokens) == {"code": 0.5, "prose": 0.5}
    assert read_shares("temperature=2", tokens) == pytest.approx({"code": 1 / 3, "prose": 2 / 3})
    assert read_shares("prose=1, code=3", tokens) == {"code": 0.75, "prose": 0.25}
    assert read_shares("prose=.5", tokens) == {"code": 0.0, "prose": 1.0}
    (tmp_path / "m.toml").write_text("prose = 0.25\ncode = 0.75\n")
    (tmp_path / "m.csv").write_text("domain,share\nprose,0.25\ncode,0.75\n")
    for name in ("m.toml", "m.csv"):
        assert read_shares(str(tmp_path / name), tokens) == {"code": 0.75, "prose": 0.25}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prsoe=1", "no domain 'prsoe'.*did you mean 'prose'"),
        ("prose", "legal: natural"),
        ("prose=x", "'x'; legal: a number"),
        ("prose=-1", "from 0 on"),
        ("prose=nan", "finite"),
        ("prose=1,prose=2", "more than once"),
        ("prose=0", "every share is 0"),
        ("temperature=0", "above 0"),
        ("nowhere.csv", "cannot be read"),
    ],
)
def test_what_is_no_mixture_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        read_shares(text, {"code": 100, "prose": 400})


def test_caps_give_to_others_what_a_domain_cannot_fill():
    tokens = {"a": 100, "b": 1000, "c": 1000}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert capped(shares, tokens, length=1000, cap=10) == pytest.approx(shares)
    assert capped(shares, tokens, length=1000, cap=2) == pytest.approx({"a": 0.2, "b": 0.48, "c": 0.32})
    # And what that fills over its cap goes further.
    assert capped(shares, tokens, length=1900, cap=1) == pytest.approx(
        {"a": 100 / 1900, "b": 1000 / 1900, "c": 800 / 1900}
    )
    assert capped({"a": 0, "b": 1, "c": 0}, tokens, length=1000, cap=1) == pytest.approx({"a": 0, "b": 1, "c": 0})
    with pytest.raises(ValueError, match=r"2\.10 passes.*at least 2\.1"):
        capped({"a": 0.5, "b": 0.5, "c": 0}, tokens, length=2310, cap=2)
