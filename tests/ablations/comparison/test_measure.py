"""What is measured on a trained branch: which budgets, and text counted in bytes."""

from ablations.comparison.measure import budgets_of, spaced_batches, text_bytes
from ablations.comparison.options import ModelOptions
from corpus.prepare import CorpusConfig, prepare


def test_budgets_are_around_the_baselines_own():
    assert budgets_of(ModelOptions(k=12).config(50)) == [2, 4, 6, 8, 12, 16]
    assert budgets_of(ModelOptions(k=3, n_experts=8).config(50)) == [1, 2, 3, 4]
    assert budgets_of(ModelOptions(k=1, n_experts=1).config(50)) == [1]


def test_batches_lie_evenly_through_the_whole_text():
    assert spaced_batches(2, 10) == [0, 5]
    assert spaced_batches(3, 10) == [0, 3, 6]
    assert spaced_batches(99, 4) == [0, 1, 2, 3]


def test_bytes_of_batches_are_those_of_the_text_they_predict(text_folder, tmp_path):
    corpus = prepare(CorpusConfig(data=(str(text_folder),), vocab_size=300), tmp_path)
    n_batches = -(-(len(corpus.valid) - 1) // 40)
    # The last batch is not full; the very first token is a document boundary, without bytes.
    assert text_bytes(corpus, range(n_batches), 40) == corpus.valid.n_bytes
    chosen = [0, n_batches - 1]
    windows = [
        corpus.valid.window(1, 40),
        corpus.valid.window(1 + chosen[1] * 40, len(corpus.valid) - 1 - chosen[1] * 40),
    ]
    assert text_bytes(corpus, chosen, 40) == sum(
        len(corpus.tokenizer.decode(window.tolist()).encode()) for window in windows
    )
