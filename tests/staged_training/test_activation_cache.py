import dataclasses
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foundation import files
from foundation.files import CorruptFileError, DiskFullError
from lm.model import RESIDUAL_DTYPE, LanguageModel
from staged_training import activation_cache
from staged_training.activation_cache import CacheIdentity, cached_activations, verify, weights_hash
from staged_training.data import PrefixBatches, TokenBatches, prefix_activations

BOUNDARY = 2
NUMBERS = (1, 4, 5, 9)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request, corpus, model_config):
    """Model, its token batches and the identity of its activations."""
    config = dataclasses.replace(model_config, dtype=request.param)
    model = LanguageModel(config).init_weights(3)
    batches = TokenBatches(corpus.train.tokens, batch_size=2, seq_len=16)
    identity = CacheIdentity(
        trunk="abc",
        weights=weights_hash(model.state_dict()),
        boundary=BOUNDARY,
        tokens="train",
        batches=NUMBERS,
        shape=(2, 16, config.d_model),
        dtype=RESIDUAL_DTYPE,
    )
    return model, batches, identity


def fill(folder, case):
    """Opens the cache; returns it with how many batches had to be computed."""
    model, batches, identity = case
    computed = []

    def compute(tokens_BT):
        computed.append(tokens_BT)
        return prefix_activations(model, tokens_BT, BOUNDARY)

    return cached_activations(folder, identity, batches, compute), len(computed)


def same(read, case):
    model, batches, _ = case
    recomputed = PrefixBatches(batches, model, BOUNDARY)
    for number in NUMBERS:
        (x_BTD, targets_BT), (expected_BTD, expected_BT) = read[number], recomputed[number]
        assert x_BTD.dtype == expected_BTD.dtype
        assert torch.equal(x_BTD, expected_BTD)
        assert torch.equal(targets_BT, expected_BT)


def test_reading_equals_recomputing_bit_for_bit(case, tmp_path):
    stored, computed = fill(tmp_path / "cache", case)
    assert computed == len(NUMBERS)
    same(stored, case)
    stored, computed = fill(tmp_path / "cache", case)
    assert computed == 0
    same(stored, case)
    with pytest.raises(IndexError, match="batch 2 is not among the 4"):
        stored[2]


def test_frozen_routers_neither_count_nor_draw(case):
    model, batches, _ = case
    model.train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    x_BTD = prefix_activations(model, batches[0][0], BOUNDARY)
    assert not x_BTD.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert all(block.training for block in model.blocks)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([activation_cache.DATA, activation_cache.MANIFEST]),
    place=st.floats(0, 1, exclude_max=True),
    damage=st.integers(0, 8),
)
def test_damage_is_named_and_the_cache_rebuilt(case, tmp_path_factory, tmp_path, caplog, name, place, damage):
    folder = tmp_path / "cache"
    fill(folder, case)
    data = bytearray((folder / name).read_bytes())
    at = int(place * len(data))
    if damage == 8:
        data = data[:at]
    else:
        data[at] ^= 1 << damage
    (folder / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match=name):
        verify(folder, case[2])
    stored, computed = fill(folder, case)
    assert computed == len(NUMBERS)
    assert "activation cache refused and rebuilt" in caplog.text
    assert name in caplog.text
    same(stored, case)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("trunk", "def"),
        ("weights", "0" * 64),
        ("boundary", 3),
        ("tokens", "valid"),
        ("batches", (1, 4, 5, 8)),
        ("dtype", "float16"),
    ],
)
def test_another_runs_cache_is_refused_by_name(case, tmp_path, field, other):
    fill(tmp_path / "cache", case)
    verify(tmp_path / "cache", case[2])
    with pytest.raises(CorruptFileError, match=f"belongs to another run: {field} is"):
        verify(tmp_path / "cache", dataclasses.replace(case[2], **{field: other}))


def test_an_interrupted_fill_goes_on(case, tmp_path):
    model, batches, identity = case
    computed = []

    def stops(tokens_BT):
        computed.append(tokens_BT)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return prefix_activations(model, tokens_BT, BOUNDARY)

    with pytest.raises(KeyboardInterrupt):
        cached_activations(tmp_path / "cache", identity, batches, stops)
    assert not (tmp_path / "cache").exists()
    # What a crash can leave behind: a batch that never reached the disk, and half a line.
    data = tmp_path / "cache.partial" / activation_cache.DATA
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    with open(tmp_path / "cache.partial" / activation_cache.PROGRESS, "a") as file:
        file.write('[2, "12')
    stored, computed_again = fill(tmp_path / "cache", case)
    assert computed_again == 3
    same(stored, case)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_another_runs_interrupted_fill_is_not_continued(case, tmp_path):
    _, batches, identity = case
    other = dataclasses.replace(identity, trunk="def")

    def stops(tokens_BT):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_activations(tmp_path / "cache", other, batches, stops)
    stored, computed = fill(tmp_path / "cache", case)
    assert computed == len(NUMBERS)
    same(stored, case)


def test_a_full_disk_is_found_before_anything_is_computed(case, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(DiskFullError, match=r"activation cache here needs .* MiB .* 1\.0 MiB are free"):
        fill(tmp_path / "here", case)
    assert list(tmp_path.iterdir()) == []
