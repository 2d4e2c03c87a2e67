"""What is measured on a trained branch: which budgets, and text counted in bytes."""

import pytest

from ablations.comparison.measure import asked_experts, budgets_of
from ablations.comparison.registry import all_methods
from ablations.method import with_policy
from corpus.prepare import CorpusConfig, prepare
from lm.options import ModelOptions
from routing.policies.expert_choice import ExpertChoice
from routing.policies.null_experts import NullExperts
from routing.policies.random_k import RandomK
from routing.policies.skipping import Skipping
from routing.policies.top_k import TopK
from routing.policies.top_p import TopP
from staged_training.validation import spaced_batches, text_bytes


def test_budgets_are_around_the_baselines_own():
    assert budgets_of(ModelOptions(k=12).config(50)) == [2, 4, 6, 8, 12, 16]
    assert budgets_of(ModelOptions(k=3, n_experts=8).config(50)) == [1, 2, 3, 4]
    assert budgets_of(ModelOptions(k=1, n_experts=1).config(50)) == [1]


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (TopK(k=7), 7),
        (TopP(target_mean=6.5, cap=16), 6.5),
        (NullExperts(k=20, n_null=40, target_mean=5), 5),
        (RandomK(k_min=2, k_max=12, k_eval=9), 9),
        (ExpertChoice(k=3.5), 4),
        # The baseline's, where the policy's threshold alone decides.
        (TopP(p=0.4, target_mean=None), 12),
        (NullExperts(k=20, n_null=40, target_mean=None), 12),
        (Skipping(k=10), 12),
        (Skipping(k=10, target_mean=6), 6),
    ],
)
def test_a_method_is_measured_against_the_number_it_asks_for_itself(policy, asked):
    baseline = ModelOptions(k=12).config(50)
    assert asked_experts(with_policy(baseline, policy), baseline) == asked


# A control of known sign may be known by its number.
@pytest.mark.parametrize("name", [name for name, method in all_methods().items() if method.known is None])
def test_registered_methods_ask_for_the_baselines_number(name):
    baseline = ModelOptions(k=5).config(50)
    assert asked_experts(all_methods()[name].change(baseline), baseline) == 5


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
