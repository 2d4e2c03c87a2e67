import io
import random
import string

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from corpus import tokenizer as tokenizer_module
from corpus.tokenizer import SPACE_MARK, Tokenizer

_random = random.Random(0)
_WORDS = [
    "".join(_random.choices(["ka", "tor", "in", "the", "sel", "mu", "ra", "ex"], k=_random.randint(1, 4)))
    for _ in range(150)
]
ENGLISH = [
    f"Def {' '.join(_random.choices(_WORDS, k=6))}: {number}\n    return self.{_random.choice(_WORDS)}\n"
    for number in range(400)
]
CHINESE = ["".join(chr(0x4E00 + (7 * i * i + j) % 3000) for j in range(200)) for i in range(60)]

# Plain text, and the strings that break tokenizers: the space mark, control spellings, line ends, byte spellings,
# format characters.
fragments = st.sampled_from(
    [
        SPACE_MARK,
        "\u2585",
        "\0",
        "\r\n",
        "\r",
        "\t",
        "     ",
        "<s>",
        "</s>",
        "<unk>",
        "<document>",
        "<0xE2>",
        "\ufeff",
        "\u3000",
        "e\u0301",
        "\U0001f600",
        "\uffff",
    ]
)
any_text = st.text() | st.lists(fragments | st.text(max_size=5) | st.sampled_from(ENGLISH)).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(ENGLISH, 400)


def train_with(**overrides) -> bytes:
    """A SentencePiece file as a user may bring it."""
    settings = {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "byte_fallback": True,
    } | overrides
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH),
        model_writer=model,
        model_type="bpe",
        minloglevel=2,
        **({"vocab_size": 380} | settings),
    )
    return model.getvalue()


@given(text=any_text)
def test_any_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(np.array(ids, dtype=np.uint16)) == text.encode()
    assert tokenizer.n_bytes_V[ids].sum() == len(text.encode())


@given(text=any_text)
def test_no_text_spells_the_boundary(tokenizer, text):
    assert tokenizer.boundary_id not in tokenizer.encode(text)


@given(texts=st.lists(any_text, max_size=6))
def test_batch_equals_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@given(data=st.data())
def test_stream_adds_up_to_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)) | any_text.map(tokenizer.encode))
    stream = tokenizer.stream_decoder()
    pushed = [stream.push(id) for id in ids]
    assert "".join(pushed) + stream.flush() == tokenizer.decode(ids)


@given(left=any_text, right=any_text)
def test_decoding_is_concatenation(tokenizer, left, right):
    ids = [*tokenizer.encode(left), tokenizer.boundary_id, *tokenizer.encode(right)]
    assert tokenizer.decode(ids) == left + right


def test_stream_holds_back_half_a_character(tokenizer):
    ids = tokenizer.encode("\U0001f600")
    stream = tokenizer.stream_decoder()
    assert [stream.push(id) for id in ids] == ["", "", "", "\U0001f600"]
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"


def test_every_single_character_comes_back(tokenizer):
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_space_mark_costs_three_tokens_and_is_not_a_space(tokenizer):
    assert len(tokenizer.encode(SPACE_MARK)) == 3
    assert tokenizer.encode(SPACE_MARK) != tokenizer.encode(" ")


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc"])
def test_lone_surrogate_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=rf"lone surrogate U\+D[8F].. at character {text.find(text.strip('abc'))}"):
        tokenizer.encode(text)


@pytest.mark.parametrize("id", [-1, 400])
def test_unknown_id_is_refused(tokenizer, id):
    with pytest.raises(ValueError, match=r"\[0, 400\)"):
        tokenizer.decode([5, id])


def test_settings_show_in_the_pieces(tokenizer):
    processor = tokenizer._processor
    pieces = [processor.id_to_piece(id) for id in range(258, tokenizer.vocab_size)]
    assert "▁▁▁▁" in pieces
    assert any("\n" in piece for piece in pieces)
    assert not any(len(piece) > 1 and set(piece) & set(string.digits) for piece in pieces)
    assert tokenizer.vocab_size == 400


def test_training_is_deterministic_and_depends_on_the_text(tokenizer):
    assert Tokenizer.train(ENGLISH, 400).hash() == tokenizer.hash()
    assert Tokenizer.train(ENGLISH[:200], 400).hash() != tokenizer.hash()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.model")
    loaded = Tokenizer.load(tmp_path / "t.model")
    assert loaded.hash() == tokenizer.hash()
    assert loaded.encode(ENGLISH[0]) == tokenizer.encode(ENGLISH[0])
    assert loaded.boundary_id == tokenizer.boundary_id


def test_hash_ignores_how_the_file_was_made():
    one, two = train_with(num_threads=1), train_with(num_threads=2)
    assert one != two
    assert Tokenizer(one).hash() == Tokenizer(two).hash()


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE, CHINESE[:2]], ids=["merges", "alphabet and merges", "alphabet"])
def test_too_large_a_vocabulary_names_the_largest(texts):
    with pytest.raises(ValueError, match=r"vocab_size 50000 is too large for this text: at most (\d+)") as caught:
        Tokenizer.train(texts, 50000)
    largest = int(str(caught.value).split()[-1])
    assert Tokenizer.train(texts, largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"at most {largest}"):
        Tokenizer.train(texts, largest + 1)


def test_too_small_a_vocabulary_names_the_smallest():
    with pytest.raises(ValueError, match="at least 261"):
        Tokenizer.train(ENGLISH, 260)
    assert Tokenizer.train(ENGLISH, 261).vocab_size == 261


@pytest.mark.parametrize("texts", [[], [""], ["\0\0"], [SPACE_MARK], ["a"]])
def test_hardly_any_text_is_a_clear_error(texts):
    with pytest.raises(ValueError, match="300"):
        Tokenizer.train(texts, 300)


def test_large_alphabet_leaves_half_of_the_vocabulary_to_merges():
    tokenizer = Tokenizer.train(CHINESE, 1258)
    processor = tokenizer._processor
    pieces = [processor.id_to_piece(id) for id in range(258, 1258)]
    # Half of the free vocabulary, the space and the barrier.
    assert 490 <= sum(len(piece) == 1 for piece in pieces) <= (1258 - 260) // 2 + 2
    text = f"{CHINESE[0]} {SPACE_MARK} {ENGLISH[0]}"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_text_with_reserved_characters_is_still_learnt():
    marked = [text.replace(" ", f" {SPACE_MARK}\u2585\0", 1) for text in ENGLISH]
    tokenizer = Tokenizer.train(marked, 400)
    assert len(tokenizer.encode(" return self.")) <= 4
    assert tokenizer.decode(tokenizer.encode(marked[0])) == marked[0]


def test_long_lines_are_learnt_from():
    tokenizer = Tokenizer.train(["".join(ENGLISH).replace("\n", " ")], 400)
    assert len(tokenizer.encode(" return self.")) <= 4


@given(texts=st.lists(st.text(alphabet="ab\n", max_size=60)), limit=st.integers(1, 9))
def test_training_pieces_are_bounded_and_lose_nothing(texts, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", limit)
        pieces = list(tokenizer_module._training_pieces(texts))
    assert "".join(pieces) == "".join(texts)
    assert all(1 <= len(piece) <= limit for piece in pieces)


def test_training_text_is_bounded(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 1000)
    assert 900 < sum(len(piece.encode()) for piece in tokenizer_module._training_pieces(ENGLISH)) <= 1000


def test_users_tokenizer_with_other_symbols_is_taken():
    tokenizer = Tokenizer(train_with(user_defined_symbols=["<|im_start|>"], bos_piece="<|startoftext|>"))
    text = "<|im_start|>user \u2581<|startoftext|><s>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.boundary_id == 1
    assert tokenizer.boundary_id not in tokenizer.encode(text)


def test_boundary_falls_back_to_eos():
    assert Tokenizer(train_with(bos_id=-1, eos_id=1)).boundary_id == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"byte_fallback": False, "vocab_size": 100}, "no byte pieces"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix=false"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces=false"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalization_rule_name=identity"),
        ({"bos_id": -1, "eos_id": -1}, "no bos or eos"),
        ({"user_defined_symbols": ["<s>"], "eos_id": -1}, "no bos or eos"),
    ],
)
def test_users_tokenizer_that_loses_text_is_refused(tmp_path, overrides, message):
    path = tmp_path / "user.model"
    path.write_bytes(train_with(**overrides))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", train_with()[:1000], train_with()[:-100]])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        Tokenizer.load(tmp_path / "y.model")
