import itertools
import json
import lzma
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import sentencepiece

from corpus import __main__ as command
from corpus import prepare as prepare_module
from corpus.__main__ import main
from corpus.compressors import xz_bits_per_byte
from corpus.documents import HoldOut, load_documents
from corpus.packing import PackedTokens, pack
from corpus.prepare import CorpusConfig, open_prepared, prepare
from corpus.readers import Skipped
from corpus.tokenizer import Tokenizer
from foundation import files
from foundation.environment import ROOT
from foundation.files import atomic_folder

REPOSITORY = Path(prepare_module.__file__).parents[1]
_random = random.Random(1)
_WORDS = [
    "".join(_random.choices(["ka", "tor", "in", "the", "sel", "mu"], k=_random.randint(1, 4))) for _ in range(150)
]
TEXTS = [f"{number}\u2581 <document>\r\n{' '.join(_random.choices(_WORDS, k=60))}\n" for number in range(200)]
VOCAB_SIZE = 500


@pytest.fixture
def data(tmp_path) -> Path:
    """200 distinct documents, 2 repetitions, 3 unusable lines."""
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": text}) for text in (*TEXTS, TEXTS[0], TEXTS[7])]
    path.write_text("\n".join([*lines[:100], "{", *lines[100:], '{"text": 1}', '{"text": "\\ud800"}']))
    return path


@pytest.fixture
def config(data) -> CorpusConfig:
    return CorpusConfig(data=(str(data),), vocab_size=VOCAB_SIZE, shard_tokens=1000)


def documents_of(prepared, packed: PackedTokens) -> list[str]:
    offsets = packed.document_offsets.tolist()
    assert all(packed.tokens[start] == prepared.tokenizer.boundary_id for start in offsets[:-1])
    return [
        prepared.tokenizer.decode_bytes(packed.tokens[start + 1 : end]).decode()
        for start, end in itertools.pairwise(offsets)
    ]


def test_token_stream_gives_the_documents_back(config, tmp_path):
    prepared = prepare(config, tmp_path / "root")
    train, valid = documents_of(prepared, prepared.train), documents_of(prepared, prepared.valid)
    assert sorted(train + valid) == sorted(TEXTS)
    assert train != [text for text in TEXTS if text in set(train)]
    assert prepared.valid_text() == "".join(valid).encode()
    assert prepared.valid.n_bytes == len(prepared.valid_text())
    assert len(list(prepared.train.folder.glob("tokens_*.bin"))) > 1


def test_manifest_counts(config, data, tmp_path):
    prepared = prepare(config, tmp_path / "root")
    manifest = prepared.manifest
    assert manifest.config == config
    assert manifest.vocab_size == prepared.tokenizer.vocab_size == VOCAB_SIZE
    assert manifest.tokenizer_hash == prepared.tokenizer.hash()
    assert manifest.train.documents + manifest.valid.documents == 200
    assert manifest.train.bytes + manifest.valid.bytes == sum(len(text.encode()) for text in TEXTS)
    assert (manifest.train.tokens, manifest.valid.tokens) == (len(prepared.train), len(prepared.valid))
    assert manifest.duplicates_removed == 2
    assert [item.place for item in manifest.skipped] == [f"{data}:{line}" for line in (101, 204, 205)]
    assert open_prepared(prepared.folder).manifest == manifest


def test_two_prepares_agree_byte_for_byte(config, tmp_path):
    first, second = (prepare(config, tmp_path / root) for root in ("a", "b"))
    assert first.folder.name == second.folder.name
    files = sorted(path.relative_to(first.folder) for path in first.folder.rglob("*") if path.is_file())
    assert len(files) > 6
    for file in files:
        assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()


def test_order_of_the_input_does_not_matter(config, data, tmp_path):
    first = prepare(config, tmp_path / "root")
    lines = data.read_text().split("\n")
    data.write_text("\n".join(reversed(lines)))
    second = prepare(config, tmp_path / "root")
    assert first.manifest.content_hash == second.manifest.content_hash
    assert first.manifest.tokenizer_hash == second.manifest.tokenizer_hash
    assert first.train.window(0, len(first.train)).tolist() == second.train.window(0, len(second.train)).tolist()
    # The manifest lists other places, so it is another folder.
    assert first.folder != second.folder


def memory_of_reading_and_packing(folder: str) -> None:
    """Prints the peak bytes of reading 2,000 documents of 12 MB, and those of packing 8 MB of tokens above what was
    there."""
    tmp_path = Path(folder)
    tracemalloc.start()
    documents = load_documents(
        (str(tmp_path / "many.jsonl"),), text_field="text", hold_out=HoldOut(share=0.1), folder=tmp_path
    )
    read = tracemalloc.get_traced_memory()[1]
    assert documents.train.n_bytes + documents.valid.n_bytes > 12_000_000
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    ids = list(range(2000))
    packed = pack(
        tmp_path / "packed", ((ids, 1) for _ in range(2000)), vocab_size=3000, boundary_id=0, shard_tokens=50_000
    )
    assert len(packed) == 2000 * 2001
    print(read, tracemalloc.get_traced_memory()[1] - before)


def test_memory_grows_with_the_documents_and_not_with_their_texts(tmp_path):
    """In a process of its own: tables of the interpreter that grow in the meantime would count."""
    with (tmp_path / "many.jsonl").open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"text": f"{number} {TEXTS[number % 200] * 15}"}) + "\n")
    code = f"from {__name__} import *; memory_of_reading_and_packing({str(tmp_path)!r})"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    read, written = map(int, said.split())
    # What is read at once, and 120 bytes a document.
    assert read < 4_000_000 + 120 * 2000
    # Documents as they come, and what is opened in the end; a shard of 50,000 tokens as numbers would be 400,000.
    assert written < 350_000


def test_second_run_only_opens(config, tmp_path, monkeypatch):
    first = prepare(config, tmp_path / "root")
    monkeypatch.delattr(prepare_module, "_write")
    assert prepare(config, tmp_path / "root").manifest == first.manifest


def test_changed_input_is_never_served_from_the_cache(config, data, tmp_path):
    first = prepare(config, tmp_path / "root")
    data.write_text(data.read_text() + '\n{"text": "one more"}')
    second = prepare(config, tmp_path / "root")
    assert second.manifest.content_hash != first.manifest.content_hash
    assert second.folder != first.folder
    assert second.manifest.train.documents + second.manifest.valid.documents == 201


@pytest.mark.parametrize(
    "name",
    [
        "train/tokens_00001.bin",
        "valid/tokens_00000.bin",
        "train/document_offsets.bin",
        "train/index.json",
        "manifest.json content_hash",
        "manifest.json tokenizer_hash",
        "manifest.json cut",
        "seal.json",
        "tokenizer.model",
    ],
)
def test_a_damaged_cache_is_named_and_made_again(config, tmp_path, name, caplog):
    folder = prepare(config, tmp_path / "root").folder
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file, _, part = name.partition(" ")
    data = bytearray((folder / file).read_bytes())
    if part == "cut":
        data = data[:200]
    elif part:
        place = data.index(f'"{part}": "'.encode()) + len(part) + 5
        data[place] = ord("0" if data[place] != ord("0") else "1")
    else:
        data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    prepare(config, tmp_path / "root")
    assert "prepared corpus refused and made again" in caplog.text
    assert Path(file).name in caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == written


def test_a_corpus_from_before_seals_opens_with_one_warning(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_warned", set())
    folder = prepare(config, tmp_path / "root").folder
    (folder / "seal.json").unlink()
    for _ in range(2):
        open_prepared(folder)
    assert caplog.text.count("was written without a seal") == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_hash": "0" * 64}))
    with pytest.raises(ValueError, match=r"tokenizer_hash is not that of tokenizer\.model"):
        open_prepared(folder)


def test_index_and_manifest_must_agree(config, tmp_path):
    folder = prepare(config, tmp_path / "root").folder
    index = json.loads((folder / "valid" / "index.json").read_text())
    (folder / "valid" / "index.json").write_text(json.dumps(index | {"n_bytes": index["n_bytes"] + 1}))
    with pytest.raises(ValueError, match=r"valid/index\.json "):
        open_prepared(folder)
    (folder / "seal.json").unlink()
    with pytest.raises(ValueError, match="not the counts of the manifest"):
        open_prepared(folder)


def test_failure_leaves_nothing_behind(config, tmp_path, monkeypatch):
    whole = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer,
        "encode_batch",
        lambda self, texts: [ids if len(texts) == 1 else ids[:-1] for ids in whole(self, texts)],
    )
    with pytest.raises(ValueError, match="does not give back the document"):
        prepare(config, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_atomic_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("a")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    with pytest.raises(OSError, match="not empty"), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("b")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "deep" / "other"):
        raise KeyboardInterrupt
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    assert (folder / "a").read_text() == "a"


def test_other_process_that_finished_first_is_believed(config, tmp_path, monkeypatch):
    write = prepare_module._write

    def slow_write(folder, *rest):
        write(folder, *rest)
        if len(list(folder.parent.iterdir())) == 1:
            prepare(config, tmp_path / "root")

    monkeypatch.setattr(prepare_module, "_write", slow_write)
    prepared = prepare(config, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == [prepared.folder]


def test_users_tokenizer_file(config, data, tmp_path):
    learnt = prepare(config, tmp_path / "root")
    file = learnt.folder / "tokenizer.model"
    with pytest.raises(ValueError, match="exclude each other"):
        CorpusConfig(tokenizer_file=str(file), vocab_size=VOCAB_SIZE)
    taken = prepare(CorpusConfig(data=(str(data),), tokenizer_file=str(file)), tmp_path / "root")
    assert taken.folder != learnt.folder
    assert taken.manifest.tokenizer_hash == learnt.manifest.tokenizer_hash
    assert taken.valid.window(0, 50).tolist() == learnt.valid.window(0, 50).tolist()
    sentencepiece.SentencePieceProcessor(model_file=str(file))


def test_zero_vocabulary_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="at least 261"):
        prepare(CorpusConfig(data=(str(data),), vocab_size=0), tmp_path / "root")


def test_open_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no readable corpus manifest"):
        open_prepared(tmp_path)


def test_xz_is_what_the_xz_format_needs():
    data = b"".join(text.encode() for text in TEXTS)
    bits = xz_bits_per_byte(data)
    assert bits == 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9)) / len(data)
    assert 1 < bits < 4
    assert xz_bits_per_byte(bytes(100_000)) < 0.05
    assert xz_bits_per_byte(random.Random(0).randbytes(100_000)) > 8
    with pytest.raises(ValueError, match="no bytes"):
        xz_bits_per_byte(b"")


def test_command_prepares_and_shows(data, tmp_path, capsys):
    arguments = ["--data", str(data), "--vocab-size", str(VOCAB_SIZE), "--root", str(tmp_path / "root")]
    main(["prepare", *arguments])
    printed = capsys.readouterr().out
    folder = next((tmp_path / "root").iterdir())
    prepared = open_prepared(folder)
    assert f"content hash      {prepared.manifest.content_hash}" in printed
    assert f"{prepared.manifest.valid.tokens:,} tokens" in printed
    assert f"{xz_bits_per_byte(prepared.valid_text()):.4f} bits per byte" in printed
    assert f"1 x not JSON in UTF-8: {data}:101" in printed
    assert f"1 x lone surrogate ... at character ...: {data}:205" in printed
    main(["show", str(folder)])
    assert facts(capsys.readouterr().out) == facts(printed)


def test_of_much_validation_text_xz_is_shown_the_beginning(config, tmp_path, monkeypatch):
    prepared = prepare(config, tmp_path / "root")
    monkeypatch.setattr(command, "XZ_TOKENS", 100)
    sample = prepared.valid_text(100)
    assert prepared.valid_text().startswith(sample)
    line = f"{xz_bits_per_byte(sample):.4f} bits per byte, of its first {len(sample):,} bytes"
    assert line in command.summary(prepared)


def facts(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if not line.startswith("corpus: ")]


def test_every_long_phase_is_announced_before_it_begins(config, tmp_path, capsys, monkeypatch):
    said: list[str] = []

    def announced(name, function):
        def wrapped(*arguments, **options):
            said.append(capsys.readouterr().out)
            assert f"corpus: {name}" in said[-1], (name, said)
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr(prepare_module, "load_documents", announced("reading", prepare_module.load_documents))
    monkeypatch.setattr(Tokenizer, "train", announced("learning a tokenizer of 500 tokens", Tokenizer.train))
    monkeypatch.setattr(prepare_module, "pack", announced("packing", prepare_module.pack))
    monkeypatch.setattr(prepare_module, "open_prepared", announced("checking", prepare_module.open_prepared))
    monkeypatch.setattr(lzma, "compress", announced("compressing", lzma.compress))
    prepared = prepare(config, tmp_path / "root")
    xz_bits_per_byte(prepared.valid_text())
    assert len(said) == 6
    prepare(config, tmp_path / "root")
    # What is there already is read and checked, not made.
    assert len(said) == 8


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["prepare", "--vocab-sise", "500"], 2, "--vocab-size"),
        (["prepare", "--data", "/nowhere"], 1, "error: /nowhere: no such file or folder"),
        (["show", "/nowhere"], 1, "error: /nowhere/manifest.json: no readable corpus manifest"),
    ],
)
def test_command_refuses_mistakes(arguments, status, message, forked):
    run = subprocess.run([sys.executable, "-m", "corpus", *arguments], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == status
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_standard_library(tmp_path):
    """The default corpus: no download, enough validation text, and nothing to list."""
    prepared = prepare(CorpusConfig(), tmp_path)
    manifest = prepared.manifest
    assert manifest.vocab_size == 4096
    assert manifest.valid.documents == 300
    assert manifest.valid.bytes > 200_000
    assert manifest.train.bytes > 5_000_000
    assert manifest.train.bytes / manifest.train.tokens > 3
    assert all(isinstance(item, Skipped) for item in manifest.skipped)
    text = prepared.valid_text() + prepared.tokenizer.decode_bytes(prepared.train.tokens[:])
    assert Path(json.__file__).read_bytes() in text
    assert b"decoding_table=codecs" not in text
    assert Path(json.__file__).with_name("decoder.py").read_bytes() in text
