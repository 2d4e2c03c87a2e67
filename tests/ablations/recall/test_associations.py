"""The generator of the recall study: what is asked can be answered from the text, and was never shown in training."""

import numpy as np
import pytest
import torch

from ablations.recall.associations import HELD_OUT_SHARE, Segment, draw_batch, is_held_out, keys_of, values_of
from ablations.recall.options import FORMS
from lm.model import IGNORED_TARGET

VOCAB = 160


def associations(tokens_BT, targets_BT, pairs):
    """Of every text those it shows, and those it asks for."""
    shown = [set(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2])) for row in tokens_BT.tolist()]
    asked = [
        [(token, target) for token, target in zip(row, targets) if target != IGNORED_TARGET]
        for row, targets in zip(tokens_BT.tolist(), targets_BT.tolist())
    ]
    return shown, asked


@pytest.mark.parametrize(("length", "pairs"), [(4, 1), (16, 4), (40, 7), (64, 16)])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_pair_is_asked_for_once(length, pairs, held_out):
    segment = Segment(length=length, pairs=pairs)
    tokens_BT, targets_BT = draw_batch(segment, VOCAB, 50, np.random.default_rng(0), held_out=held_out)
    assert tokens_BT.shape == targets_BT.shape == (50, length)
    assert tokens_BT.dtype == targets_BT.dtype == torch.int64
    for shown, asked in zip(*associations(tokens_BT, targets_BT, pairs)):
        assert len(asked) == pairs
        assert set(asked) == shown
        assert len({key for key, _ in shown}) == pairs
        assert all(key in keys_of(VOCAB) and value in values_of(VOCAB) for key, value in shown)
    # Questions stand behind the pairs.
    assert (targets_BT[:, : 2 * pairs] == IGNORED_TARGET).all()


def test_training_and_test_share_no_association():
    segment = Segment(length=64, pairs=16)
    seen = {held_out: set() for held_out in (False, True)}
    for held_out, found in seen.items():
        for seed in range(40):
            batch = draw_batch(segment, VOCAB, 64, np.random.default_rng(seed), held_out=held_out)
            found.update(*associations(*batch, 16)[0])
    assert not seen[False] & seen[True]
    # Nearly all there are have come up in one of them: nothing is left out of both.
    assert len(seen[False] | seen[True]) > 0.99 * len(keys_of(VOCAB)) * len(values_of(VOCAB))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_share_that_is_held_out(form):
    keys, values = np.array(keys_of(form.vocab_size)), np.array(values_of(form.vocab_size))
    held = is_held_out(*np.meshgrid(keys[:512], values[:512], indexing="ij"))
    assert held.mean() == pytest.approx(HELD_OUT_SHARE, rel=0.1)
    # Of every key some are held out and some are not.
    assert held.any(axis=1).all()
    assert not held.all(axis=1).any()


def test_questions_come_early_rather_than_late():
    _, targets_BT = draw_batch(Segment(length=256, pairs=4), VOCAB, 400, np.random.default_rng(0), held_out=False)
    places = (targets_BT != IGNORED_TARGET).float().mean(dim=0)[8::2]
    assert places[:31].sum() > 2 * places[-31:].sum() > 0


def test_the_same_generator_gives_the_same_texts():
    segment = Segment(length=32, pairs=4)
    first, again, other = (
        draw_batch(segment, VOCAB, 8, np.random.default_rng(seed), held_out=False) for seed in (3, 3, 4)
    )
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("length", "pairs"), [(15, 4), (3, 1), (64, 0)])
def test_segments_without_room_are_refused(length, pairs):
    with pytest.raises(ValueError, match=r"Segment\.(pairs|length)"):
        Segment(length=length, pairs=pairs)


def test_a_small_vocabulary_is_refused():
    with pytest.raises(ValueError, match="which has 7 keys"):
        Segment(length=64, pairs=16).check(16)
    with pytest.raises(ValueError, match="of whose 21 values a key has none"):
        Segment(length=64, pairs=16).check(42)
