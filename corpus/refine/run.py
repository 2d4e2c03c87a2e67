"""A refinement from its input to its report: the passes in their order, by one process or several, continued where an
earlier try was stopped.

    <out>/kept/<shard>.jsonl.gz      documents as they came, with text, domain, language and scores
    <out>/dropped/<shard>.jsonl.gz   documents as they came, with the layer, the reason and who else would have
    <out>/models/                    what layers 9, 10 and 12 learnt; for --models
    <out>/report.html, *.csv         see corpus.refine.report
    <out>/refinement.json            what was asked and read; written last
    <out>/work/                      while it runs
"""

import contextlib
import functools
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from corpus.readers import place_of
from corpus.refine import models as learning
from corpus.refine import outcome, passes, together
from corpus.refine.config import RefineConfig
from corpus.refine.passes import Job
from corpus.refine.report import Report, read_report, write_report
from corpus.refine.shards import cut_into_shards, items_of
from corpus.sources import find_files
from foundation.files import (
    SEAL,
    check_seal,
    fingerprint,
    read_json,
    remove_leftovers,
    seal,
    sha256_file,
    try_lock,
    write_json,
)
from foundation.source import code_of

RESULT = "refinement.json"
# What says nothing about the result.
NO_MATTER = ("out", "workers")


def refine(config: RefineConfig) -> Report:
    """Refines, or finds it done.

    Returns:
        what the report shows.

    Raises:
        ValueError: for data that cannot be used, or a folder that holds something else.
    """
    files, unknown = find_files(config.data)
    identity = _identity(config, files)
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        if (out / RESULT).is_file() and _is_finished(out, identity):
            _say(f"{out} holds this refinement already")
            return read_report(out)
        _prepare_folder(out, identity)
        if unknown:
            _say(f"passed over {len(unknown)} files that no reader knows; the report names them")
        job = Job(config, out / "work")
        with _processes(config.workers) as each:
            shards = _passes(job, files, each)
        report = write_report(out, job, shards, [place_of(path) for path in unknown])
        for name in ("kept", "dropped", "models"):
            # A try that was stopped here has moved some of them.
            if (job.work / name).exists():
                shutil.rmtree(out / name, ignore_errors=True)
                (job.work / name).rename(out / name)
        kept = [f"{name}/{shard}.jsonl.gz" for name in ("kept", "dropped") for shard in shards]
        write_json(out / RESULT, identity)
        seal(out, [RESULT, *kept])
        shutil.rmtree(job.work)
    return report


def _passes(job: Job, files: Sequence[Path], each: "Each") -> list[str]:
    config, work = job.config, job.work
    _say(f"reading {len(files)} files into shards of {config.shard_mb:g} MB")
    read = functools.partial(
        _read, folder=work / "shards", text_field=config.text_field, shard_bytes=int(config.shard_mb * 1e6)
    )
    each(read, [pair for pair in enumerate(files) if not (work / "shards" / f"{pair[0]:05d}.parts").is_file()])
    shards = [name for number in range(len(files)) for name in read_json(work / "shards" / f"{number:05d}.parts")]
    if not shards:
        raise ValueError(f"no document in {', '.join(config.data)}")
    _on_shards(job, shards, each, "judged", passes.judge, "layers of rules")
    if not (job.models / SEAL).is_file() and not (job.work / "decided.done").is_file():
        _learn(job, shards)
    _on_shards(job, shards, each, "scored", passes.score, "layers with a model")
    if not (work / "marked").is_file():
        _say("near-duplicates and paragraphs that stood before")
        together.mark(job, shards)
    _on_shards(job, shards, each, "edited", passes.edit, "documents without such paragraphs")
    if not (work / "decided.done").is_file():
        _say("near-duplicates once more, and clusters")
        together.decide(job, shards, config)
    _on_shards(job, shards, each, "written", outcome.write, "writing")
    return shards


def _read(pair: tuple[int, Path], *, folder: Path, text_field: str, shard_bytes: int) -> None:
    number, file = pair
    cut_into_shards(file, number, folder, text_field=text_field, shard_bytes=shard_bytes)


def _on_shards(
    job: Job, shards: Sequence[str], each: "Each", name: str, work: Callable[[Job, str], None], phase: str
) -> None:
    missing = [shard for shard in shards if not job.file(name, shard, "done").is_file()]
    _say(f"{phase}: {len(missing)} of {len(shards)} shards")
    each(functools.partial(work, job), missing)


def _learn(job: Job, shards: Sequence[str]) -> None:
    if job.config.models is not None:
        found = learning.Models.load(job.config.models)
    else:
        _say(
            "learning what is usual"
            if job.config.trusted
            else "learning clusters; no trusted set, so no more than that"
        )
        kept = (
            (item.text, item.language)
            for shard in shards
            for item in items_of(job.file("judged", shard, "jsonl"))
            if item.layer is None
        )
        found = learning.learn(job.config, kept)
    job.models.mkdir(exist_ok=True)
    found.save(job.models)


Each = Callable[[Callable[[Any], None], Sequence[Any]], None]


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Each]:
    """How to do a thing for each of many: here, or in processes of our own."""
    if workers == 1:

        def here(work: Callable[[Any], None], values: Sequence[Any]) -> None:
            for value in values:
                work(value)

        yield here
        return
    # Not fork: a parent with threads (BLAS) must not be copied.
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:

        def each(work: Callable[[Any], None], values: Sequence[Any]) -> None:
            for _ in pool.imap_unordered(work, values):
                pass

        yield each


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as lock:
        if not try_lock(lock.fileno(), out / ".lock"):
            raise ValueError(f"{out}: another process is refining into this folder")
        yield


def _identity(config: RefineConfig, files: Sequence[Path]) -> dict[str, Any]:
    """Everything that the result is a function of."""
    settings = {name: value for name, value in asdict(config).items() if name not in NO_MATTER}
    for name in ("block_list", "unsafe_list"):
        settings[name] = None if settings[name] is None else sha256_file(settings[name])
    settings["models"] = None if config.models is None else sha256_file(config.models / SEAL)
    trusted, _ = find_files(config.trusted)
    code = {name: value for name, value in code_of((__name__,)).items() if name.startswith("corpus/")}
    return {
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "files": [[place_of(path), path.stat().st_size, sha256_file(path)] for path in files],
        "trusted": [[place_of(path), path.stat().st_size, sha256_file(path)] for path in trusted],
        "code": fingerprint(code),
    }


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    if read_json(out / RESULT) != identity:
        raise ValueError(f"{out} holds a refinement of other data, settings or code; give another --out, or remove it")
    check_seal(out)
    return True


def _prepare_folder(out: Path, identity: dict[str, Any]) -> None:
    """Goes on with a try of the same refinement; one of another is forgotten."""
    begun = out / "work" / "identity.json"
    if begun.is_file() and read_json(begun) == identity:
        for folder in (out / "work", *(out / "work").iterdir()):
            if folder.is_dir():
                remove_leftovers(folder)
        return
    strange = [path.name for path in out.iterdir() if path.name not in (".lock", "work", "kept", "dropped", "models")]
    if strange and not begun.is_file():
        raise ValueError(f"{out}: holds {', '.join(sorted(strange)[:3])}; give a folder of its own with --out")
    shutil.rmtree(out / "work", ignore_errors=True)
    begun.parent.mkdir()
    write_json(begun, identity)


def _say(phase: str) -> None:
    print(f"corpus: {phase}", flush=True)
