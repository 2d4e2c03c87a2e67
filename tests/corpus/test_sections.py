"""Sections of the held-out text: every predicted byte lies in one, none is long, and the default text has many."""

import numpy as np

from ablations.comparison.options import Options
from corpus.documents import load_documents
from corpus.prepare import CorpusConfig, prepare
from corpus.sections import LONGEST, sections


def test_sections_are_the_documents_cut_evenly(tmp_path):
    texts = ["a b c d e f g h. " * n for n in (1, 40, 3, 90, 2, 17, 33, 8, 71, 5)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(f"{number} {text}")
    corpus = prepare(CorpusConfig(data=(str(tmp_path),), vocab_size=264, valid_share=0.6), tmp_path / "root")
    offsets, stream = corpus.valid.document_offsets, corpus.valid.window(0, len(corpus.valid))
    found = sections(corpus.valid, corpus.tokenizer, longest=50)
    # The first token of the stream is a boundary, predicted by nobody.
    assert len(found.section_N) == len(stream) - 1
    assert found.n_bytes_S.sum() == corpus.valid.n_bytes
    places = np.array([0, *found.section_N])
    for section, (document, n_bytes) in enumerate(zip(found.document_S, found.n_bytes_S)):
        (own,) = np.nonzero(places == section)
        assert len(own) <= 50
        assert offsets[document] <= own[0] <= own[-1] < offsets[document + 1]
        assert len(corpus.tokenizer.decode_bytes(stream[own])) == n_bytes
    lengths = np.bincount(places)
    for document in range(corpus.valid.n_documents):
        assert np.ptp(lengths[found.document_S == document]) <= 1
    assert max(np.bincount(found.document_S)) > 1


def test_the_default_validation_text_has_300_sections_at_least():
    config = Options().corpus
    documents = load_documents(config.data, text_field=config.text_field, hold_out=config.hold_out())
    # A token of Python source stands for less than 5 bytes with the default vocabulary (3.6 were measured).
    assert sum(-(-len(text.encode()) // (5 * LONGEST)) for text in documents.valid) >= 300
