import gzip
import hashlib
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from corpus import readers
from corpus.documents import HoldOut, load_documents
from corpus.readers import Document, Skipped
from corpus.sources import read_paths, read_standard_library


def read(*paths, text_field="text") -> tuple[list[str], list[Skipped]]:
    items = list(read_paths([str(path) for path in paths], text_field=text_field))
    return [item.text for item in items if isinstance(item, Document)], [
        item for item in items if isinstance(item, Skipped)
    ]


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(path, data: bytes):
    path.write_bytes(data)
    return path


TEXTS = ["one\r\ntwo", "\u4f60\u597d \u2581", "three\n\n"]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.jsonl", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("A.JSONL.GZ", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
        # Parallel compressors write several frames one after the other.
        ("b.jsonl.zst", lambda data: zstandard.compress(data[:20]) + zstandard.compress(data[20:])),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_jsonl(tmp_path, monkeypatch, name, compress, chunk_bytes):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
    path = write(tmp_path / name, compress(b"\xef\xbb\xbf" + jsonl(*TEXTS) + b"\n \r\n" + jsonl("last").rstrip()))
    assert read(path) == ([*TEXTS, "last"], [])


LINE = "line\n"
BOOK = "".join(f"{'word ' * (number % 90)}end {number}.\n{LINE * (number % 7)}\n" for number in range(1500))


def test_a_book_is_cut_into_documents_at_blank_lines_and_loses_nothing(tmp_path):
    parts, skipped = read(write(tmp_path / "book.txt", BOOK.encode()))
    assert "".join(parts) == BOOK
    assert not skipped
    assert len(parts) > 20
    assert all(part.endswith("\n\n") for part in parts[:-1])
    assert all(readers.PIECE <= len(part) < 2 * readers.PIECE for part in parts[:-1])
    # It has a part on each side now, as text that is many files has.
    documents = load_documents([str(tmp_path)], text_field="text", hold_out=HoldOut(share=0.1))
    assert sorted([*documents.train, *documents.valid]) == sorted(parts)


@pytest.mark.parametrize("change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text])
def test_copies_of_a_book_stay_copies(tmp_path, change):
    write(tmp_path / "a.txt", BOOK.encode())
    write(tmp_path / "b.txt", change(BOOK).encode())
    documents = load_documents([str(tmp_path)], text_field="text", hold_out=HoldOut(share=0.1))
    assert documents.duplicates_removed == len(documents.train) + len(documents.valid)


@pytest.mark.parametrize("text", ["x" * 250_000, "y\n" * 70_000, "é\u2028" * 60_000 + "\n\n" + "z" * 90_000])
def test_long_text_without_blank_lines_is_cut_all_the_same(tmp_path, text):
    parts, _ = read(write(tmp_path / "long.md", text.encode()))
    assert "".join(parts) == text
    assert all(len(part) <= 3 * readers.PIECE for part in parts)


def test_what_a_folder_holds_beside_text_is_named(tmp_path):
    write(tmp_path / "a.txt", b"text")
    for name in ("paper.pdf", "deeper/table.csv", ".hidden.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"?")
    texts, skipped = read(tmp_path)
    assert texts == ["text"]
    assert [item.place for item in skipped] == [str(tmp_path / "deeper/table.csv"), str(tmp_path / "paper.pdf")]
    assert all(item.reason.startswith("unknown file type; legal are .txt, .md") for item in skipped)


def test_what_looks_like_a_file_and_is_none_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl("one"))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.txt")
    texts, skipped = read(tmp_path)
    assert texts == ["one"]
    assert [item.place for item in skipped] == [str(tmp_path / "b.jsonl"), str(tmp_path / "c.txt")]
    assert {item.reason for item in skipped} == {"a link to nothing, or no file"}
    path.unlink()
    with pytest.raises(ValueError, match="no file of a known type in this folder"):
        read(tmp_path)


def test_a_domain_that_no_file_can_hold_is_escaped():
    assert Document("text", "a.jsonl", {"domain": "half \ud800"}).domain == "half \\ud800"


def test_no_place_of_a_document_stays_in_the_interpreter(tmp_path, monkeypatch):
    """What is interned lies in a table of the whole process, which grew by a megabyte now and then."""
    interned = []
    monkeypatch.setattr(sys, "intern", lambda text: interned.append(text) or text)
    path = write(tmp_path / "many.jsonl", jsonl(*map(str, range(50))))
    found = load_documents((str(path),), text_field="text", hold_out=HoldOut(documents=1))
    assert set(found.train.domains) == {"many"}
    assert not [text for text in interned if "many.jsonl:" in text]


def test_text_files_are_taken_as_they_are(tmp_path):
    for number, text in enumerate(TEXTS):
        write(tmp_path / f"{number}.{'md' if number else 'txt'}", text.encode())
    assert read(tmp_path) == (TEXTS, [])


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(
        pa.table({"body": pa.array([*TEXTS, None, ""]), "n": [1, 2, 3, 4, 5]}), path, row_group_size=2
    )
    texts, skipped = read(path, text_field="body")
    assert texts == TEXTS
    assert skipped == [
        Skipped(f"{path}:4", "the text is not a string but NoneType"),
        Skipped(f"{path}:5", "empty text"),
    ]


def test_parquet_of_several_batches_counts_rows_through(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": [f"row {n}" if n != 1500 else None for n in range(1, 3001)]}), path)
    texts, skipped = read(path)
    assert len(texts) == 2999
    assert [item.place for item in skipped] == [f"{path}:1500"]


def test_parquet_string_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.parquet"
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0")
    pa.parquet.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))}), path)
    texts, skipped = read(path)
    assert texts == ["a", "b"]
    assert [item.place for item in skipped] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"other": ["x"], "more": ["y"]}, "no column 'text'; it has 'other', 'more'"),
        ({"text": [1]}, "not a string but int"),
    ],
)
def test_parquet_without_text(tmp_path, column, reason):
    pa.parquet.write_table(pa.table(column), tmp_path / "a.parquet")
    texts, skipped = read(tmp_path)
    assert texts == []
    assert len(skipped) == 1
    assert reason in skipped[0].reason


BAD_LINES = {
    b"{": "not JSON",
    b'{"text": "a"} x': "not JSON",
    b'{"text": "caf\xe9"}': "not JSON in UTF-8",
    b"[" * 100_000: "nested too deeply",
    b'["text"]': "not a JSON object but list",
    b'"text"': "not a JSON object but str",
    b'{"txt": "a"}': "no field 'text'",
    b'{"text": 3}': "not a string but int",
    b'{"text": null}': "not a string but NoneType",
    b'{"text": ["a"]}': "not a string but list",
    b'{"text": ""}': "empty text",
    b'{"text": "ab\\ud800"}': "lone surrogate U+D800 at character 2",
    b"\0\0\0": "not JSON",
}


def test_bad_lines_are_listed_with_their_places(tmp_path):
    lines = [line for bad in BAD_LINES for line in (bad, b'{"text": "good"}')]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    texts, skipped = read(path)
    assert texts == ["good"] * len(BAD_LINES)
    assert [item.place for item in skipped] == [f"{path}:{line}" for line in range(1, 2 * len(BAD_LINES), 2)]
    for item, reason in zip(skipped, BAD_LINES.values()):
        assert reason in item.reason


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]))
def test_garbage_never_raises(tmp_path_factory, data, suffix):
    path = write(tmp_path_factory.mktemp("garbage") / f"a{suffix}", data)
    texts, skipped = read(path)
    for item in skipped:
        assert item.place.startswith(str(path))
    if suffix in (".jsonl.gz", ".jsonl.zst") and data:
        assert texts == []


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress], ids=["gz", "zst"]
)
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_compressed_file_keeps_what_came_before(tmp_path, monkeypatch, compress, damage):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 10)
    everything = [f"document {number} {number**7}" for number in range(2000)]
    data = compress(jsonl(*everything))
    half = len(data) // 2
    data = data[:half] if damage == "truncated" else data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]
    path = write(tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst"), data)
    texts, skipped = read(path)
    assert len(texts) < 2000
    if damage == "truncated":
        assert texts == everything[: len(texts)]
    assert any(
        "unreadable from here on" in item.reason and item.place == f"{path}:{len(texts) + len(skipped)}"
        for item in skipped
    )


def test_truncated_parquet_is_listed(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", data[: len(data) // 2])
    texts, skipped = read(tmp_path)
    assert texts == []
    assert len(skipped) == 1


def test_text_file_that_is_not_utf8_is_listed(tmp_path):
    bad = write(tmp_path / "bad.txt", b"caf\xe9")
    empty = write(tmp_path / "empty.md", b"")
    write(tmp_path / "good.txt", b"good")
    texts, skipped = read(tmp_path)
    assert texts == ["good"]
    assert [item.place for item in skipped] == [str(bad), str(empty)]


def test_folder_walk(tmp_path):
    for name in ("b/2.txt", "a/1.md", "a.txt", ".hidden/x.txt", "a/.x.txt", "a/photo.png", "c/deep/er/3.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jsonl(name) if name.endswith("jsonl") else name.encode())
    # A named pipe would block for ever, a link to the folder above would never end, and a link to nothing cannot be
    # read.
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.txt").mkdir()
    texts, skipped = read(tmp_path)
    assert texts == ["a/1.md", "a.txt", "b/2.txt", "c/deep/er/3.jsonl"]
    others = [tmp_path / name for name in ("a/photo.png", "dangling.txt", "pipe.txt")]
    assert [item.place for item in skipped] == [str(path) for path in others]


def test_file_name_that_is_not_utf8(tmp_path):
    write(tmp_path / "bad\udcff.txt", b"\xff")
    _, skipped = read(tmp_path)
    assert skipped[0].place.encode().endswith(rb"bad\udcff.txt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "missing: no such file or folder"),
        (lambda folder: folder, "no file of a known type"),
        (
            lambda folder: write(folder / "a.png", b"x"),
            r"a.png: unknown file type; legal are .txt, .md, .jsonl, .ndjson, .json \(each also as .gz and .zst\)",
        ),
        (lambda folder: "", "empty path"),
    ],
)
def test_unusable_path_is_a_clear_error(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read(make(tmp_path))


@pytest.mark.parametrize(("name", "module"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_optional_package_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}: pip install -e "\.\[corpus\]"'):
        read(write(tmp_path / name, b"x"))


def test_only_bad_input_is_a_clear_error(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{\n[]\n")
    with pytest.raises(
        ValueError, match=r"2 skipped, first ones: .*a\.jsonl:1: not JSON.*a\.jsonl:2: not a JSON object"
    ):
        load_documents([str(path)], text_field="text", hold_out=HoldOut(share=0.5))


@pytest.mark.parametrize("wrong", [{"documents": 0}, {"characters": -1}])
def test_what_is_held_out_must_be_something(wrong):
    with pytest.raises(ValueError, match=f"HoldOut.{next(iter(wrong))}"):
        HoldOut(**wrong)


@pytest.mark.parametrize("valid_share", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_valid_share_must_be_a_share(tmp_path, valid_share):
    path = write(tmp_path / "a.jsonl", jsonl("a", "b"))
    with pytest.raises(ValueError, match=r"HoldOut.share: .* must lie between 0 and 1"):
        load_documents([str(path)], text_field="text", hold_out=HoldOut(share=valid_share))


def test_empty_split_is_a_clear_error(tmp_path):
    path = write(tmp_path / "a.txt", b"one document")
    with pytest.raises(ValueError, match="one distinct document cannot be both trained on and held out"):
        load_documents([str(path)], text_field="text", hold_out=HoldOut(share=0.1))


def test_by_default_a_stretch_of_each_of_many_documents_is_held_out(tmp_path):
    texts = ["".join(f"{number} says line {line}\n" for line in range(5 + number)) for number in range(1000)]
    path = write(tmp_path / "a.jsonl", jsonl(*texts))
    found = load_documents([str(path)], text_field="text", hold_out=HoldOut())
    assert (len(found.valid), len(found.train)) == (300, 700)
    begun = 0
    for stretch in found.valid:
        number = int(stretch.split()[0])
        assert stretch in texts[number]
        assert texts[number] not in set(found.train)
        assert len(stretch) == min(800, len(texts[number]))
        begun += not texts[number].startswith(stretch)
    # Of those that are longer, most do not begin with their document.
    assert begun > 200
    whole = load_documents([str(path)], text_field="text", hold_out=HoldOut(characters=0))
    assert list(whole.train) == list(found.train)
    assert set(whole.valid) <= set(texts)
    assert found.valid.n_bytes == sum(map(len, found.valid)) < whole.valid.n_bytes


def test_half_of_a_few_documents_is_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(*(f"text {number}" for number in range(9))))
    found = load_documents([str(path)], text_field="text", hold_out=HoldOut())
    assert (len(found.valid), len(found.train)) == (4, 5)


@pytest.mark.parametrize("valid_share", [1e-9, 0.06, 0.5, 1 - 1e-9])
def test_neither_side_of_a_few_documents_is_empty(tmp_path, valid_share):
    path = write(tmp_path / "few.jsonl", jsonl("one", "two", "three"))
    found = load_documents([str(path)], text_field="text", hold_out=HoldOut(share=valid_share))
    assert len(found.valid) >= 1
    assert len(found.train) >= 1
    assert {*found.train, *found.valid} == {"one", "two", "three"}


@given(texts=st.lists(st.text(min_size=1), min_size=8, max_size=40), seed=st.randoms())
def test_split_does_not_depend_on_order_or_repetition(tmp_path_factory, texts, seed):
    folder = tmp_path_factory.mktemp("order")
    shuffled = [*texts, *texts[:3]]
    seed.shuffle(shuffled)
    results = []
    for name, lines in (("a.jsonl", texts), ("b.jsonl", shuffled)):
        try:
            results.append(
                load_documents(
                    [str(write(folder / name, jsonl(*lines)))], text_field="text", hold_out=HoldOut(share=0.5)
                )
            )
        except ValueError:
            results.append(None)
    first, second = results
    if first is None or second is None:
        assert first is second
        return
    assert (first.train, first.valid, first.content_hash) == (second.train, second.valid, second.content_hash)
    distinct = {as_shown(text) for text in texts}
    assert sorted(map(as_shown, [*first.train, *first.valid])) == sorted(distinct)
    assert {*first.train, *first.valid} <= set(texts)
    assert first.duplicates_removed == len(texts) - len(distinct)
    assert second.duplicates_removed == len(shuffled) - len(distinct)


def as_shown(text):
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("reverse", [False, True])
def test_copies_that_differ_in_marks_stand_in_one_split_only(tmp_path, reverse):
    texts = [f"document {number}\nof two lines\n" for number in range(40)]
    copies = [text.replace("\n", "\r\n") for text in texts]
    marked = ["\ufeff" + text for text in texts]
    old = [text.replace("\n", "\r") for text in texts]
    every = [*texts, *copies, *marked, *old]
    path = write(tmp_path / "all.jsonl", jsonl(*(reversed(every) if reverse else every)))
    found = load_documents([str(path)], text_field="text", hold_out=HoldOut(share=0.3))
    assert not {as_shown(text) for text in found.valid} & {as_shown(text) for text in found.train}
    assert len(found.train) + len(found.valid) == 40
    assert found.duplicates_removed == 120
    # What stays is a text that was read, whichever came first.
    assert {*found.train, *found.valid} <= set(every)
    again = write(tmp_path / "again.jsonl", jsonl(*sorted(every)))
    same = load_documents([str(again)], text_field="text", hold_out=HoldOut(share=0.3))
    assert (same.train, same.valid, same.content_hash) == (found.train, found.valid, found.content_hash)


def test_without_such_copies_the_hashes_are_those_of_the_texts(tmp_path):
    texts = [f"line\r\nends {number}" for number in range(20)]
    path = write(tmp_path / "texts.jsonl", jsonl(*texts))
    found = load_documents([str(path)], text_field="text", hold_out=HoldOut(share=0.3))
    hashes = sorted(hashlib.sha256(text.encode()).digest() for text in texts)
    assert found.content_hash == hashlib.sha256(b"".join(hashes)).hexdigest()
    assert [hashlib.sha256(text.encode()).digest() for text in [*found.valid, *found.train]] == hashes


def test_documents_keep_their_split_when_others_are_added(tmp_path):
    few = write(tmp_path / "few.jsonl", jsonl(*map(str, range(200))))
    many = write(tmp_path / "many.jsonl", jsonl(*map(str, range(2000))))
    small, large = (load_documents([str(path)], text_field="text", hold_out=HoldOut(share=0.1)) for path in (few, many))
    assert set(small.valid) < set(large.valid)
    assert set(small.train) < set(large.train)
    assert small.content_hash != large.content_hash
    # Expected 200, standard deviation 13.4.
    assert 140 < len(large.valid) < 260
    assert list(large.train) != sorted(large.train, key=int)


def test_standard_library_rule(tmp_path):
    files = {
        "a.py": b"'''doc'''",
        "email/b.py": b"b",
        "encodings/__init__.py": b"search",
        "encodings/cp1.py": b"decoding_table = ()",
        "encodings/cp2.py": b"decoding_map = {}",
        "other/table.py": b"decoding_table = ()",
        "empty.py": b"",
        "data.txt": b"no",
        **{
            f"{folder}/x.py": b"no"
            for folder in ("site-packages", "dist-packages", "test", "a/tests", "idlelib/idle_test", "__pycache__")
        },
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write(tmp_path / "latin.py", b"# caf\xe9")
    items = list(read_standard_library(tmp_path))
    assert [item.text for item in items if isinstance(item, Document)] == [
        "'''doc'''",
        "b",
        "search",
        "decoding_table = ()",
    ]
    assert [item.place for item in items if isinstance(item, Skipped)] == [str(tmp_path / "latin.py")]


def test_missing_standard_library_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="give your own text with --data"):
        list(read_standard_library(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", jsonl(*TEXTS)),
        ("a.json", jsonl(*TEXTS)),
        ("a.json.gz", gzip.compress(jsonl(*TEXTS), mtime=0)),
        ("array.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("array.json.zst", zstandard.compress(json.dumps([{"text": text} for text in TEXTS]).encode())),
        ("A.NDJSON.ZST", zstandard.compress(jsonl(*TEXTS))),
    ],
)
def test_other_names_of_the_same(tmp_path, name, data):
    assert read(write(tmp_path / name, data)) == (TEXTS, [])


@pytest.mark.parametrize(("name", "compress"), [("a.txt.gz", gzip.compress), ("b.md.zst", zstandard.compress)])
def test_compressed_text_is_one_document_or_named(tmp_path, name, compress):
    path = write(tmp_path / name, compress(TEXTS[0].encode()))
    assert read(path) == ([TEXTS[0]], [])
    write(path, compress(TEXTS[0].encode())[:-3])
    assert [item.place for item in read(path)[1]] == [str(path)]


def test_a_window_longer_than_readers_take_by_themselves(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    # Without its size in the header a frame says what window it needs.
    path = write(tmp_path / "a.jsonl.zst", compressor.compress(jsonl(*TEXTS)) + compressor.flush())
    assert read(path) == (TEXTS, [])


def test_nested_fields(tmp_path):
    lines = [
        {"meta": {"text": "inner"}},
        {"meta.text": "whole name"},
        {"meta": "none"},
        {"meta": {"other": 1}},
        {"text": "x"},
    ]
    path = write(tmp_path / "a.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    texts, skipped = read(path, text_field="meta.text")
    assert texts == ["inner", "whole name"]
    assert {item.reason for item in skipped} == {"no field 'meta.text'"}
    pa.parquet.write_table(pa.table({"meta": [{"text": "row"}], "n": [1]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="meta.text") == (["row"], [])


def test_a_giant_line_takes_time_in_proportion(monkeypatch):
    """Counted, not timed: bytes that joining and splitting touch."""
    chunk, n = b"x" * 1000, 400
    touched = 0

    class Counting(bytes):
        def split(self, *arguments):
            nonlocal touched
            touched += len(self)
            return super().split(*arguments)

    (line,) = readers._lines(Counting(chunk) for _ in range(n))
    assert line == chunk * n
    assert touched == len(chunk) * n


def test_what_differs_from_file_to_file_makes_no_kinds(tmp_path):
    """Of a thousand files in another encoding the summary has one line."""
    write(tmp_path / "good.jsonl", jsonl("one", "two"))
    for number in range(4):
        write(tmp_path / f"latin_{number}.txt", b"a" * number + bytes([0xE0 + number]))
        damaged = bytearray(gzip.compress(b"text %d" % number))
        damaged[-8] ^= 1 + number
        write(tmp_path / f"crc_{number}.txt.gz", bytes(damaged))
    found = load_documents((str(tmp_path),), text_field="text", hold_out=HoldOut(documents=1))
    assert [(kind.count, kind.reason) for kind in found.skipped_kinds] == [(4, "not UTF-8"), (4, "unreadable")]
    assert "invalid continuation byte" in found.skipped[-1].reason or "unexpected end" in found.skipped[-1].reason


def test_skips_are_summed_up_by_kind(tmp_path):
    lines = [b'{"text": "good %d"}' % number for number in range(60)] + [b"{", b"[1]", b'{"text": 5}'] * 700
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    write(tmp_path / "b.pdf", b"%PDF")
    found = load_documents([str(tmp_path)], text_field="text", hold_out=HoldOut(share=0.5))
    assert [(kind.count, kind.reason) for kind in found.skipped_kinds] == [
        (700, "not JSON in UTF-8"),
        (700, "not a JSON object but list"),
        (700, "the text is not a string but int"),
        (1, "unknown file type; legal are .txt, .md, .jsonl, .ndjson, .json (each also as .gz and .zst) and .parquet"),
    ]
    assert len(found.skipped) == 1000
    assert found.skipped_kinds[0].line() == (
        f"700 x not JSON in UTF-8: {', '.join(f'{path}:{number}' for number in range(61, 76, 3))} and 695 more"
    )
    assert found.skipped_kinds[-1].line().endswith(str(tmp_path / "b.pdf"))
