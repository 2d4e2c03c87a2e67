"""What is measured on a trained branch: which budgets, and text counted in bytes."""

from ablations.defaults import ModelOptions
from ablations.measure import budgets_of, text_bytes
from corpus.prepare import CorpusConfig, prepare


def test_budgets_are_around_the_baselines_own():
    assert budgets_of(ModelOptions(k=12).config(50)) == [2, 4, 6, 8, 12, 16]
    assert budgets_of(ModelOptions(k=3, n_experts=8).config(50)) == [1, 2, 3, 4]
    assert budgets_of(ModelOptions(k=1, n_experts=1).config(50)) == [1]


def test_bytes_of_the_first_targets_are_those_of_their_text(text_folder, tmp_path):
    corpus = prepare(CorpusConfig(data=(str(text_folder),), vocab_size=300), tmp_path)
    everything = text_bytes(corpus, len(corpus.valid) * 2)
    assert everything == corpus.valid.n_bytes
    first = corpus.valid.window(1, 40).tolist()
    assert text_bytes(corpus, 40) == len(corpus.tokenizer.decode(first).encode()) < everything
