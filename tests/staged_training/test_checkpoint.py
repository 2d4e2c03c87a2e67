import ast
import errno
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import staged_training
from foundation import files
from foundation.files import CorruptFileError, DiskFullError
from staged_training import checkpoint

IDENTITY = {"schedule": {"peak": 0.1, "decay_steps": 4}, "seed": 0}


def write(folder, step):
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()}
    return checkpoint.save(
        folder,
        step,
        weights=weights,
        optimizer={"exp_avg:w": weights["w"] * 2},
        state={"identity": IDENTITY, "position": step},
    )


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, 10)
    write(folder, 20)
    return folder


def test_round_trip_and_two_are_kept(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.skipped, loaded.state["position"], loaded.state["identity"]) == (15, (), 15, IDENTITY)
    expected = torch.randn(3, 5, generator=torch.Generator().manual_seed(15))
    assert torch.equal(loaded.weights["w"], expected)
    assert torch.equal(loaded.optimizer["exp_avg:w"], expected * 2)
    assert loaded.weights["b"].dtype == torch.bfloat16


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load_latest(tmp_path / "nothing") is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*checkpoint.FILES, checkpoint.MANIFEST]),
    place=st.floats(0, 1, exclude_max=True),
    damage=st.integers(0, 8),
)
def test_any_flipped_bit_or_truncation_is_found(two_checkpoints, tmp_path, caplog, name, place, damage):
    shutil.rmtree(tmp_path)
    shutil.copytree(two_checkpoints, tmp_path)
    victim = tmp_path / "step_00000020" / name
    data = bytearray(victim.read_bytes())
    at = int(place * len(data))
    if damage == 8:
        data = data[:at]
    else:
        data[at] ^= 1 << damage
    victim.write_bytes(data)
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded is not None
    assert loaded.step == 10
    (reason,) = loaded.skipped
    assert "step_00000020" in reason
    assert name in reason
    assert reason in caplog.text


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
def test_a_missing_file_is_found(two_checkpoints, tmp_path, name):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    (tmp_path / "copy" / "step_00000020" / name).unlink()
    loaded = checkpoint.load_latest(tmp_path / "copy")
    assert loaded is not None
    assert loaded.step == 10
    assert f"{name} is missing" in loaded.skipped[0]


def test_a_checkpoint_under_another_steps_name_is_refused(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints / "step_00000010", tmp_path / "step_00000030")
    with pytest.raises(CorruptFileError, match="that of step 10"):
        checkpoint.verify(tmp_path / "step_00000030")


def test_all_corrupt_is_an_error_and_no_fresh_start(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    for step in ("step_00000010", "step_00000020"):
        (tmp_path / "copy" / step / checkpoint.WEIGHTS).write_bytes(b"")
    with pytest.raises(CorruptFileError, match=r"no usable checkpoint.*step_00000020.*step_00000010"):
        checkpoint.load_latest(tmp_path / "copy")


def test_a_corrupt_later_checkpoint_is_replaced_in_time(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    (tmp_path / "copy" / "step_00000020" / checkpoint.STATE).write_text("{}")
    write(tmp_path / "copy", 15)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["step_00000010", "step_00000015"]


def test_a_full_disk_is_found_before_writing(two_checkpoints, tmp_path, monkeypatch):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    before = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"step_00000030 needs .* MiB .* 0\.0 MiB are free; nothing was written"):
        write(tmp_path / "copy", 30)
    assert {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("failing", ["save_file", "fsync_path", "write_sealed"])
def test_a_disk_that_fills_up_while_writing_leaves_the_old_ones(two_checkpoints, tmp_path, monkeypatch, failing):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    real = getattr(checkpoint, failing)
    calls = []

    def fails(*arguments):
        calls.append(arguments)
        if failing == "write_sealed" or len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, failing, fails)
    with pytest.raises(DiskFullError, match=r"could not be written.*No space left.*earlier checkpoints are untouched"):
        write(tmp_path / "copy", 30)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["step_00000010", "step_00000020"]
    monkeypatch.undo()
    loaded = checkpoint.load_latest(tmp_path / "copy")
    assert loaded is not None
    assert loaded.step == 20


def test_what_a_killed_write_left_is_ignored_and_removed(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "copy")
    shutil.copytree(two_checkpoints / "step_00000020", tmp_path / "copy" / ".step_00000030.tmp")
    loaded = checkpoint.load_latest(tmp_path / "copy")
    assert loaded is not None
    assert loaded.step == 20
    write(tmp_path / "copy", 30)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["step_00000020", "step_00000030"]


def test_what_a_kill_left_of_an_old_checkpoint_goes_when_the_run_goes_on(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    half_removed = tmp_path / "run" / "step_00000005"
    shutil.copytree(two_checkpoints / "step_00000010", half_removed)
    (half_removed / checkpoint.WEIGHTS).unlink()
    checkpoint.drop_others(tmp_path / "run", 20)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_00000010", "step_00000020"]


def test_another_schedule_is_refused_by_name(two_checkpoints):
    saved = checkpoint.load_latest(two_checkpoints)
    assert saved is not None
    checkpoint.refuse_other_identity(saved, IDENTITY)
    with pytest.raises(checkpoint.CheckpointMismatchError, match=r"schedule\.decay_steps: stored 4, asked 8"):
        checkpoint.refuse_other_identity(saved, {**IDENTITY, "schedule": {"peak": 0.1, "decay_steps": 8}})


def test_another_model_is_refused_by_name_and_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {
        "0.weight": torch.zeros(4, 3),
        "0.bias": torch.zeros(5),
        "1.weight": torch.zeros(2, 4).half(),
        "2.weight": torch.zeros(1),
    }
    with pytest.raises(checkpoint.CheckpointMismatchError) as error:
        checkpoint.restore_model(model, weights, "somewhere")
    for part in (
        "somewhere",
        "1.bias is missing",
        "2.weight is unknown",
        "0.bias is [5]",
        "1.weight is [2, 4] torch.float16",
    ):
        assert part in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def unpickles(path):
    """Whether a file of code opens pickles: by itself, or through torch's distributed checkpoints and broadcasts."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        if any(
            name in ("pickle", "torch.load", "torch.save", "np.load")
            or name.startswith("torch.distributed.checkpoint")
            or name.endswith(("_object_list", "_gather_object"))
            for name in names
        ):
            return True
    return False


def test_only_training_in_several_processes_unpickles():
    folder = Path(staged_training.__file__ or "").parent
    assert [path.name for path in sorted(folder.glob("*.py")) if unpickles(path)] == [
        "many_processes.py",
        "shards.py",
    ]
    # They say so.
    for name in ("many_processes.py", "shards.py"):
        text = " ".join((ast.get_docstring(ast.parse((folder / name).read_text())) or "").split())
        assert "as a pickle" in text
    assert "continue runs of your own only" in text
