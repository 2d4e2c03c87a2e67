import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.packing import PackedTokens, pack

BOUNDARY = 1
documents_of = st.lists(st.lists(st.integers(2, 99), max_size=12), min_size=1, max_size=12)


def pack_documents(folder, documents, *, shard_tokens=5, vocab_size=100) -> PackedTokens:
    return pack(
        folder,
        ((ids, 3 * len(ids)) for ids in documents),
        vocab_size=vocab_size,
        boundary_id=BOUNDARY,
        shard_tokens=shard_tokens,
    )


@pytest.fixture
def packed(tmp_path) -> PackedTokens:
    return pack_documents(tmp_path / "packed", [[10, 11, 12], [], [13] * 9])


@given(documents=documents_of, shard_tokens=st.integers(1, 40), data=st.data())
def test_stream_is_the_documents_whatever_the_shards(tmp_path_factory, documents, shard_tokens, data):
    packed = pack_documents(tmp_path_factory.mktemp("packing") / "p", documents, shard_tokens=shard_tokens)
    stream = [token for ids in documents for token in (BOUNDARY, *ids)]
    assert len(packed) == len(packed.tokens) == len(stream)
    assert packed.tokens[:].tolist() == stream
    assert packed.n_bytes == 3 * sum(map(len, documents))
    assert packed.n_documents == len(documents)
    spans = itertools.pairwise(packed.document_offsets)
    assert [packed.tokens[start:end].tolist() for start, end in spans] == [[BOUNDARY, *ids] for ids in documents]
    start = data.draw(st.integers(0, len(stream) - 1))
    length = data.draw(st.integers(1, len(stream) - start))
    window = packed.window(start, length)
    assert window.dtype == np.int64
    assert window.tolist() == stream[start : start + length]
    cut = data.draw(st.slices(len(stream)).filter(lambda cut: cut.step in (None, 1)))
    assert packed.tokens[cut].tolist() == stream[cut]
    index = data.draw(st.integers(-len(stream), len(stream) - 1))
    assert packed.tokens[index] == stream[index]
    packed.verify()
    assert len(list(packed.folder.glob("tokens_*.bin"))) == -(-len(stream) // shard_tokens)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_smallest_dtype_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    packed = pack_documents(tmp_path / "p", [[vocab_size - 1]], vocab_size=vocab_size)
    assert packed.tokens.dtype == dtype
    assert packed.window(0, 2).tolist() == [1, vocab_size - 1]
    assert isinstance(packed.tokens[0:2], np.memmap)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, -1), (15, 1), (14, 2), (0, 16), (100, 1)])
def test_window_outside_the_stream_is_refused(packed, start, length):
    assert len(packed) == 15
    with pytest.raises(ValueError, match=f"no window of {length} tokens at position {start}: the stream has 15 tokens"):
        packed.window(start, length)


@pytest.mark.parametrize("index", [15, -16])
def test_index_outside_the_stream_is_refused(packed, index):
    with pytest.raises(IndexError):
        packed.tokens[index]
    with pytest.raises(ValueError, match="step"):
        packed.tokens[::2]


def test_window_is_the_readers_own_copy(packed):
    packed.window(0, 5)[:] = 0
    assert packed.window(0, 5).tolist() == [1, 10, 11, 12, 1]


def test_nothing_to_pack_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        pack_documents(tmp_path / "p", [])
    with pytest.raises(ValueError, match="shard_tokens must be at least 1, got 0"):
        pack_documents(tmp_path / "q", [[1]], shard_tokens=0)


@pytest.mark.parametrize("name", ["tokens_00000.bin", "tokens_00002.bin", "document_offsets.bin"])
def test_one_flipped_bit_is_found(packed, name):
    path = packed.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = PackedTokens(packed.folder)
    with pytest.raises(ValueError, match=f"{name}: content differs from its checksum"):
        damaged.verify()


@pytest.mark.parametrize("name", ["tokens_00001.bin", "document_offsets.bin"])
def test_truncated_or_missing_file_is_found_at_open(packed, name):
    path = packed.folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}: \d+ bytes, the index says \d+"):
        PackedTokens(packed.folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        PackedTokens(packed.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("shards"),
        lambda index: index.update(format=99),
        lambda index: index.update(n_tokens=14),
        lambda index: index.update(n_documents=4),
        lambda index: index["shards"].pop(),
    ],
)
def test_wrong_index_is_found_at_open(packed, change):
    path = packed.folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json"):
        PackedTokens(packed.folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", None])
def test_unreadable_index_is_found_at_open(packed, content):
    path = packed.folder / "index.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="no readable index"):
        PackedTokens(packed.folder)
