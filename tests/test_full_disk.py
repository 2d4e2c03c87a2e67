"""A disk that really runs full, by a limit on the size of files: each kind of writer says one line that names what it
wrote, leaves nothing that stands in the way, and the same call goes on when there is room again."""

import contextlib
import json
import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from corpus.prepare import CorpusConfig, prepare
from foundation.files import DiskFullError, write_text
from foundation.tables import write_table
from lm.config import ModelConfig
from lm.model import LanguageModel
from lm.pretrained import load_pretrained, save_pretrained
from moe.config import MoEConfig
from routing.policies.top_k import TopK
from routing.router import RouterConfig
from routing.trace import RouterTrace
from staged_training import checkpoint
from staged_training.activation_cache import CacheIdentity, cached_activations
from staged_training.data import TokenBatches
from staged_training.progress import METRICS, MetricsFile


@contextlib.contextmanager
def room_for(n_bytes: int) -> Iterator[None]:
    """No file of this process grows past `n_bytes`; Python ignores SIGXFSZ, so writing further is an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def model():
    moe = MoEConfig(n_experts=8, d_expert=16, router=RouterConfig(policy=TopK(k=2)))
    return LanguageModel(ModelConfig(vocab_size=300, n_layers=1, d_model=32, moe=moe)).init_weights(0)


def test_preparing_a_text(tmp_path):
    data = tmp_path / "text.jsonl"
    write_text(data, "\n".join(json.dumps({"text": f"the {n} words of {n * n} texts " * 20}) for n in range(80)))
    config = CorpusConfig(data=(str(data),), vocab_size=280)
    for limit in (1000, 9000):
        with (
            room_for(limit),
            pytest.raises(DiskFullError, match=r"root/.+ could not be written: File too large"),
        ):
            prepare(config, tmp_path / "root")
        assert list((tmp_path / "root").iterdir()) == []
    assert len(prepare(config, tmp_path / "root").train) > 9000 / 2


@pytest.mark.parametrize("limit", [40, 1000])
def test_a_checkpoint(tmp_path, limit):
    def save(step):
        checkpoint.save(tmp_path, step, weights={"w": torch.ones(500)}, optimizer={"m": torch.ones(9)}, state={"a": 1})

    save(1)
    with room_for(limit), pytest.raises(DiskFullError, match=r"step_00000002 could not be written .*File too large"):
        save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    save(2)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.skipped) == (2, ())


def test_the_metrics_of_a_run(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    for step in range(1, 21):
        metrics.write({"step": step, "loss": 1.0}, {"step": step})
    with room_for(100), pytest.raises(DiskFullError, match=rf"{METRICS} could not be written: File too large"):
        metrics.flush()
    # What a checkpoint at step 2 continues with.
    metrics = MetricsFile(tmp_path, 2)
    metrics.write({"step": 3, "loss": 1.0}, {"step": 3})
    metrics.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3]


# The header of the list of what is done, that list, the activations.
@pytest.mark.parametrize(("width", "limit"), [(1, 50), (1, 500), (8, 1000)])
def test_stored_activations(tmp_path, width, limit):
    batches = TokenBatches(np.arange(2 * 4 * 8 + 1) % 7, batch_size=2, seq_len=4)
    identity = CacheIdentity(
        trunk="t" * 64,
        weights="w",
        boundary=1,
        tokens="n",
        batches=tuple(range(8)),
        shape=(2, 4, width),
        dtype="float32",
    )

    def filled():
        return cached_activations(
            tmp_path / "here", identity, batches, lambda tokens_BT: tokens_BT[..., None].float().expand(2, 4, width)
        )

    with room_for(limit), pytest.raises(DiskFullError, match=r"here.*File too large"):
        filled()
    x_BTD, _ = filled()[3]
    assert torch.equal(x_BTD[..., 0], batches[3][0].float())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_finished_model(tmp_path, model, limit):
    with room_for(limit), pytest.raises(DiskFullError, match=r"model could not be written: .*File too large"):
        save_pretrained(tmp_path / "model", model)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(tmp_path / "model", model)
    load_pretrained(tmp_path / "model")


def test_a_table_keeps_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ["a"], [[1]])
    with room_for(100), pytest.raises(DiskFullError, match=r"table\.csv could not be written: File too large"):
        write_table(path, ["a"], [[n] for n in range(1000)])
    assert path.read_text() == "a\n1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_trace(tmp_path, model):
    tokens_BT = torch.arange(64).view(1, 64)

    def traced():
        with RouterTrace(model, tmp_path / "trace"), torch.no_grad():
            model(tokens_BT)

    with room_for(200), pytest.raises(DiskFullError, match=r"trace/.* could not be written: File too large"):
        traced()
    traced()
    assert len(list((tmp_path / "trace").iterdir())) == 1


def test_what_is_no_file_is_written_to_and_a_link_stays_one(tmp_path):
    link, target = tmp_path / "link.csv", tmp_path / "target.csv"
    target.write_text("old")
    link.symlink_to(target)
    write_table(link, ["a"], [])
    assert link.is_symlink()
    assert target.read_text() == "a\n"
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to("/dev/null")
    write_table(nowhere, ["a"], [])
    assert nowhere.is_char_device()
    if (full := tmp_path / "full").symlink_to("/dev/full") is None and full.exists():
        with pytest.raises(DiskFullError, match=r"/dev/full could not be written: No space left"):
            write_table(full, ["a"], [])
