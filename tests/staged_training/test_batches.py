import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.model import IGNORED_TARGET
from staged_training.data import TokenBatches, branch_order, trunk_order


@settings(deadline=None)
@given(n_batches=st.integers(1, 40), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_batch_once(n_batches, seed, epochs):
    order = trunk_order(n_batches, seed, 0, n_batches * epochs).reshape(epochs, n_batches)
    assert (np.sort(order, axis=1) == np.arange(n_batches)).all()


@settings(deadline=None)
@given(n_batches=st.integers(1, 30), seed=st.integers(0, 99), start=st.integers(0, 100), count=st.integers(0, 50))
def test_any_position_is_reached_without_those_before_it(n_batches, seed, start, count):
    whole = trunk_order(n_batches, seed, 0, start + count)
    assert (trunk_order(n_batches, seed, start, count) == whole[start:]).all()


@settings(deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=2, max_size=4, unique=True), count=st.integers(1, 60))
def test_branches_of_all_seeds_see_the_same_set(seeds, count):
    batches = trunk_order(25, 7, 11, count)
    orders = [branch_order(batches, seed) for seed in seeds]
    for seed, order in zip(seeds, orders):
        assert sorted(order) == sorted(batches)
        assert (order == branch_order(batches, seed)).all()


def test_seeds_and_epochs_differ():
    assert (trunk_order(50, 0, 0, 50) != trunk_order(50, 1, 0, 50)).any()
    assert (trunk_order(50, 0, 0, 50) != trunk_order(50, 0, 50, 50)).any()
    assert (branch_order(np.arange(50), 0) != branch_order(np.arange(50), 1)).any()
    # An epoch of the trunk and a branch of the same seed are different permutations.
    assert (trunk_order(50, 0, 0, 50) != branch_order(np.arange(50), 0)).any()


def test_order_never_changes_between_versions():
    # Written down: a resumed run, a cache and a published comparison all depend on it.
    assert trunk_order(8, 0, 0, 16).tolist() == [0, 3, 7, 5, 1, 2, 6, 4, 4, 7, 6, 1, 2, 0, 5, 3]
    assert branch_order(np.arange(8), 3).tolist() == [5, 6, 3, 7, 0, 1, 2, 4]


def test_composition_is_fixed_and_targets_are_the_next_tokens():
    stream = np.arange(100, dtype=np.uint16)
    batches = TokenBatches(stream, batch_size=3, seq_len=4)
    assert len(batches) == 99 // 12
    tokens_BT, targets_BT = batches[2]
    assert tokens_BT.tolist() == [[24, 25, 26, 27], [28, 29, 30, 31], [32, 33, 34, 35]]
    assert torch.equal(targets_BT, tokens_BT + 1)
    with pytest.raises(IndexError):
        batches[len(batches)]


@settings(deadline=None)
@given(length=st.integers(2, 60), rows=st.integers(1, 3), columns=st.integers(1, 7))
def test_padded_batches_predict_every_token_once(length, rows, columns):
    stream = np.arange(100, 100 + length, dtype=np.uint16)
    batches = TokenBatches(stream, batch_size=rows, seq_len=columns, pad=True)
    predicted = []
    for index in range(len(batches)):
        tokens_BT, targets_BT = batches[index]
        counted = targets_BT != IGNORED_TARGET
        assert torch.equal(targets_BT[counted], tokens_BT[counted] + 1)
        predicted += targets_BT[counted].tolist()
    assert predicted == stream[1:].tolist()


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="has 12 tokens; one batch of 3 rows of 4 tokens needs 13"):
        TokenBatches(np.zeros(12, dtype=np.uint16), batch_size=3, seq_len=4)
