"""The cascade as a whole: nothing lost, the same result whatever happens on the way, and its command."""

import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from corpus.__main__ import main
from corpus.refine import passes
from corpus.refine import run as run_module
from corpus.refine.config import LAYER_NAMES, RefineConfig
from corpus.refine.dirt import KINDS, DirtConfig, personal, spoil
from corpus.refine.page import Page
from corpus.refine.run import refine
from tests.corpus.refining import ROOT, chinese, english, read_out, write_jsonl

# Folders of `work` in the order in which a refinement writes them.
PHASES = ("shards", "judged", "models", "scored", "before", "edited", "decided", "written")
# What depends on the machine's speed, and what names the folder's files by it.
TIMED = ("speed.csv", "report.html", "seal.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clean text of two languages, every kind of dirt, fields of the documents' own, and broken lines."""
    folder = tmp_path_factory.mktemp("data")
    texts = *english()[:80:2], *chinese(30)
    clean = [{"meta": {"text": text, "n": n}, "id": f"d{n}"} for n, text in enumerate(texts)]
    write_jsonl(folder / "a_clean.jsonl", clean)
    with (folder / "a_clean.jsonl").open("a") as file:
        file.write('{"meta": {"text": "cut off\n[1]\n{"meta": {}}\n{"meta": {"text": ""}}\n')
    spoil(DirtConfig(data=(str(folder),), text_field="meta.text", out=folder / "dirt.tmp", each=2))
    dirt = [json.loads(line) for line in (folder / "dirt.tmp").open(encoding="utf-8")]
    (folder / "dirt.tmp").unlink()
    # Of text that is not there a second time: such documents are to be kept.
    dirt = [one for one in dirt if "personal" not in one["dirt"]]
    rng = random.Random(0)
    for language, texts in (("en", english()[121:161:5]), ("zh", chinese(4, seed=2))):
        dirt += [{"text": personal(text, rng), "dirt": f"{language} personal"} for text in texts]
    write_jsonl(folder / "b_dirt.jsonl", [{"meta": {"text": one.pop("text")}, **one} for one in dirt])
    (folder / "c_notes.pdf").write_bytes(b"%PDF")
    return folder


@pytest.fixture(scope="module")
def trusted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trusted")
    return write_jsonl(
        folder / "trusted.jsonl", [{"meta": {"text": text}} for text in (*english()[1:120:2], *chinese(60, seed=1))]
    )


def config(data, out, **changes) -> RefineConfig:
    return RefineConfig(**{"data": (str(data),), "text_field": "meta.text", "shard_mb": 0.05, "out": out, **changes})


@pytest.fixture(scope="module")
def refined(data, trusted, tmp_path_factory):
    out = tmp_path_factory.mktemp("refined") / "out"
    return refine(config(data, out, trusted=(str(trusted),)))


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def test_kept_and_dropped_are_what_came_in_layer_by_layer(refined, data):
    lines = [line for path in sorted(data.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    kept, dropped = read_out(refined.folder, "kept"), read_out(refined.folder, "dropped")
    assert len(kept) + len(dropped) == len(lines) == refined.totals["in"]
    entered = len(lines)
    assert [row.layer for row in refined.layers] == list(LAYER_NAMES)
    reasons = Counter(record["dropped_by"] for record in dropped)
    for row in refined.layers:
        assert (row.entered, row.kept + row.dropped, row.dropped) == (entered, entered, reasons[row.layer])
        assert row.alone == sum(record["dropped_by"] == row.layer and not record["also"] for record in dropped)
        entered = row.kept
    assert all(record["reason"] for record in dropped)
    with (refined.folder / "reasons.csv").open(encoding="utf-8") as file:
        assert sum(int(row["documents"]) for row in csv.DictReader(file)) == len(dropped)
    assert sum(record["reason"].startswith("unreadable") for record in dropped) == 4


def test_documents_keep_their_fields_and_dropped_ones_their_text(refined, data):
    lines = (data / "a_clean.jsonl").read_text(encoding="utf-8").split("\n")[:70]
    came = {record["id"]: record for record in map(json.loads, lines)}
    found = [record for name in ("kept", "dropped") for record in read_out(refined.folder, name) if "id" in record]
    assert {record["id"] for record in found} == came.keys()
    for record in found:
        assert record["meta"]["n"] == came[record["id"]]["meta"]["n"]
        assert record["domain"] == "a_clean"
        if "dropped_by" in record:
            assert record["meta"] == came[record["id"]]["meta"]
    kept = [record for record in found if "dropped_by" not in record]
    assert len(kept) > 0.65 * len(came)
    assert all(record["refined"]["bucket"] in ("head", "middle", "tail") for record in kept)


def test_dropped_text_files_are_not_lost_and_all_may_be_dropped(tmp_path):
    (tmp_path / "short.txt").write_text("too short\n")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    # What is kept by the rules and dropped with all others in sight is written as it came, too.
    text = english()[0] + "\n\nAll rights reserved.\n"
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text)
    report = refine(config(tmp_path, tmp_path / "out", text_field="text"))
    dropped = {record["domain"]: record.get("text") for record in read_out(report.folder, "dropped")}
    assert dropped == {"short": "too short\n", "broken": None, "b": text}
    assert [record["text"] for record in read_out(report.folder, "kept")] == [english()[0] + "\n\n"]
    report = refine(config(tmp_path / "short.txt", tmp_path / "nothing", text_field="text"))
    assert (report.totals["in"], report.totals["kept"], report.totals["bytes_kept"]) == (1, 0, 0)


def test_fields_that_are_no_unicode_leave_a_line_that_is(tmp_path):
    text = english()[0]
    lines = [json.dumps({"text": text, "title": "half \ud800", "domain": "two\twords \udfff"}), '{"text": "short"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    report = refine(config(tmp_path / "in.jsonl", tmp_path / "out", text_field="text"))
    (kept,) = read_out(report.folder, "kept")
    assert (kept["text"], kept["title"]) == (text, "half \ud800")
    domains = [line.split(",")[:3] for line in (report.folder / "domains.csv").read_text().splitlines()[1:]]
    assert domains == [["in", "1", "0"], ["two\twords \\udfff", "1", "1"]]


def test_what_is_longer_than_any_document_is_dropped_unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "LONGEST", 5000)
    pages = []
    monkeypatch.setattr(passes, "Page", lambda text, **more: pages.append(len(text)) or Page(text, **more))
    giant = "\n\n".join(english()[:20])
    path = write_jsonl(tmp_path / "in.jsonl", [giant, min(english(), key=len)])
    report = refine(config(path, tmp_path / "out", text_field="text"))
    assert [len(read_out(report.folder, name)) for name in ("kept", "dropped")] == [1, 1]
    (dropped,) = read_out(report.folder, "dropped")
    assert (dropped["text"], dropped["dropped_by"]) == (giant, "length")
    assert dropped["reason"] == "more than 5,000 characters"
    assert max(pages) <= 5000 < len(giant)


def test_dirt_is_caught_and_personal_data_masked(refined):
    kept = Counter(record.get("dirt") for record in read_out(refined.folder, "kept"))
    for language, kinds in KINDS.items():
        for kind in kinds:
            left = kept[f"{language} {kind}"]
            assert left == 0 or kind in ("personal", "flood", "shuffled"), (kind, left)
    assert kept["en personal"] + kept["zh personal"] >= 4
    for record in read_out(refined.folder, "kept"):
        if "personal" in record.get("dirt", ""):
            assert "2024-03-15 $1,299.00 128.50" in record["meta"]["text"]
            assert "<EMAIL> <PHONE> <ID_NUMBER> <CARD_NUMBER> <IP_ADDRESS>" in record["meta"]["text"]
    assert all(refined.totals[f"masked {kind}"] >= 3 for kind in ("EMAIL", "PHONE", "ID_NUMBER", "IP_ADDRESS"))


def test_the_report_shows_every_layer_and_ten_of_what_it_dropped(refined):
    page = (refined.folder / "report.html").read_text(encoding="utf-8")
    assert "c_notes.pdf" in page
    with (refined.folder / "dropped_samples.csv").open(encoding="utf-8") as file:
        samples = Counter(row["layer"] for row in csv.DictReader(file))
    for row in refined.layers:
        assert f"<b>{row.layer}</b>" in page
        assert samples[row.layer] == min(row.dropped, 10)
    with (refined.folder / "speed.csv").open(encoding="utf-8") as file:
        speed = {row["layer"]: float(row["seconds"]) for row in csv.DictReader(file)}
    assert {*LAYER_NAMES, "rules", "without a model", "all"} == speed.keys()
    assert speed["all"] == pytest.approx(sum(speed[name] for name in LAYER_NAMES), abs=0.01)
    assert speed["rules"] == pytest.approx(sum(speed[name] for name in LAYER_NAMES[:8]), abs=0.01)


def test_what_is_refined_stays_as_it_is(refined, tmp_path):
    again = refine(config(refined.folder / "kept", tmp_path / "again", models=refined.folder / "models"))
    assert {row.layer: row.dropped for row in again.layers if row.dropped} == {}
    assert read_out(again.folder, "kept") == read_out(refined.folder, "kept")


def test_two_workers_do_the_same(refined, data, trusted, tmp_path):
    other = refine(config(data, tmp_path / "two", trusted=(str(trusted),), workers=2))
    assert contents(other.folder) == contents(refined.folder)


@pytest.mark.parametrize("phases", [("scored",), pytest.param(PHASES, marks=pytest.mark.long)])
def test_killed_and_started_again_it_does_the_same(refined, data, trusted, tmp_path, phases, forked):
    """Killed once in each phase, wherever it is then."""
    out, rng = tmp_path / "killed", random.Random(0)
    words = [
        "refine",
        "--data",
        str(data),
        "--trusted",
        str(trusted),
        "--text-field",
        "meta.text",
        "--shard-mb",
        "0.05",
    ]
    command = [sys.executable, "-m", "corpus", *words, "--out", str(out), "--workers", "1"]
    for phase in phases:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None and not list((out / "work" / phase).glob("[!.]*")):
            time.sleep(0.005)
        time.sleep(rng.random() / 20)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "refinement.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    # What the command was given, which a call from Python does not leave.
    (out / "options.toml").unlink()
    assert contents(out) == contents(refined.folder)


def test_done_once_it_is_found(refined, data, trusted, monkeypatch, capsys):
    monkeypatch.delattr(run_module, "_passes")
    words = ["--data", str(data), "--trusted", str(trusted), "--text-field", "meta.text", "--shard-mb", "0.05"]
    main(["refine", *words, "--out", str(refined.folder)])
    said = capsys.readouterr().out
    assert "holds this refinement already" in said
    assert f"report          {refined.folder / 'report.html'}" in said


def test_a_folder_of_something_else_is_refused(refined, data, tmp_path):
    with pytest.raises(ValueError, match="holds a refinement of other data, settings or code"):
        refine(config(data, refined.folder, without=("clusters",)))
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.tex; give a folder of its own"):
        refine(config(data, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("fr",)}, "--languages fr: legal are en, zh, code"),
        ({"without": ("minhash",)}, "--without minhash: legal are normalise, block_list"),
        ({"workers": 0}, "RefineConfig.workers: 0, must be at least 1"),
        ({"trusted": ("a",), "models": Path("b")}, "exclude each other"),
        ({"unsafe_list": Path("/nowhere")}, "--unsafe-list /nowhere: no such file"),
        ({"models": Path("/nowhere")}, "--models /nowhere: no models of a refinement here"),
    ],
)
def test_what_is_not_legal_is_said(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(data, tmp_path, **changes)
    with pytest.raises(ValueError, match="--data names nothing"):
        RefineConfig(data=(), out=tmp_path)


def test_a_trusted_set_that_is_too_small_is_refused(data, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [{"meta": {"text": text}} for text in english()[:5]])
    with pytest.raises(ValueError, match=r"--trusted: at least 40 documents of one language are needed.* found 5 en"):
        refine(config(data, tmp_path / "out", trusted=(str(few),)))


def test_layers_can_be_left_out(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [*english()[:5], *english()[:5], "too short"])
    report = refine(config(path, tmp_path / "out", text_field="text", without=("near_duplicates", "length", "lines")))
    rows = {row.layer: row for row in report.layers}
    assert rows["near_duplicates"].state == "left out"
    assert rows["perplexity"].state == "off: no trusted set"
    assert rows["near_duplicates"].dropped == rows["length"].dropped == 0
    assert report.totals["kept"] >= 8


def test_layers_are_datatrove_filters(tmp_path):
    pytest.importorskip("datatrove", reason="needs datatrove, of the extra `corpus`")
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import BaseFilter

    from corpus.refine.datatrove_blocks import blocks

    found = blocks(config(tmp_path, tmp_path / "out"))
    assert [block.name for block in found] == list(LAYER_NAMES[:8])
    assert all(isinstance(block, BaseFilter) for block in found)
    texts = [english()[0] + " Write to li.1@post.example.org.", chinese(1)[0], "short"]
    pipeline = iter([Document(text=text, id=str(n)) for n, text in enumerate(texts)])
    for block in found:
        pipeline = block.run(pipeline)
    kept = list(pipeline)
    assert [(document.id, document.metadata["language"]) for document in kept] == [("0", "eng"), ("1", "cmn")]
    assert kept[0].text.endswith("Write to <EMAIL>.")


def peak_of_refining(folder: Path, megabytes: float, shard_mb: float) -> float:
    """Peak memory in MB of refining so much generated text with planted duplicates, by a process of its own."""
    rng, texts = random.Random(0), english()
    words = sorted({word for text in texts for word in text.split()})
    path, size, last = folder / f"{megabytes}.jsonl", 0, ""
    with path.open("w") as file:
        while size < megabytes * 1e6:
            # Real sentences with a tenth of the words drawn anew; every twentieth document is there twice.
            text = (
                last
                if last and rng.random() < 0.05
                else " ".join(
                    rng.choice(words) if rng.random() < 0.1 else word for word in rng.choice(texts).split(" ")
                )
            )
            last = text
            size += file.write(json.dumps({"text": text}) + "\n")
    # Without torch, which the command imports for the sake of others.
    code = (
        "import resource, sys; from pathlib import Path; from corpus.refine.config import RefineConfig;"
        "from corpus.refine.run import refine;"
        "report = refine(RefineConfig(data=(sys.argv[1],), out=Path(sys.argv[2]), shard_mb=float(sys.argv[3])));"
        "print(*(row.layer for row in report.layers), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(path), str(folder / f"{megabytes}.out"), str(shard_mb)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "near_duplicates" in said
    return int(said.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    small, large = peak_of_refining(tmp_path, 0.1, 0.05), peak_of_refining(tmp_path, 0.3, 0.05)
    # Interpreter, libraries and the sample for the clusters are in both.
    assert large < small + 30


def test_more_shards_than_a_process_may_have_files(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", english()[:60])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, hard))
    try:
        report = refine(config(path, tmp_path / "out", text_field="text", shard_mb=0.001))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((report.folder / "kept").iterdir())) > 50
    assert report.totals["in"] == 60


@pytest.mark.long
def test_a_gigabyte_takes_less_than_a_gigabyte_of_memory(tmp_path):
    assert peak_of_refining(tmp_path, 1000, 16) < 1000
