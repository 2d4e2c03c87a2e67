import json
import subprocess
import sys

import pytest

from staged_training.__main__ import main

TINY = [
    *(
        "--dtype",
        "float32",
        "--vocab-size",
        "300",
        "--d-model",
        "16",
        "--n-layers",
        "4",
        "--n-experts",
        "4",
        "--d-expert",
        "8",
    ),
    *(
        "--n-heads",
        "2",
        "--n-kv-heads",
        "1",
        "--head-dim",
        "8",
        "--k",
        "2",
    ),
    *("--tokens", "640", "--batch-size", "2", "--seq-len", "16", "--freeze", "0.5"),
]


def test_a_trunk_and_a_branch(documents, tmp_path, capsys):
    command = ["run", "--out", str(tmp_path), "--data", str(documents), *TINY]
    main(command)
    first = capsys.readouterr().out
    for part in (
        "trunk ",
        "estimated time",
        "peak memory",
        "trunk step=17/17",
        "activations train",
        "baseline-seed0 step=3/3",
        "valid bpb=",
    ):
        assert part in first, part
    main(command)
    again = capsys.readouterr().out
    assert again.count("finished before") == 2
    assert "step=" not in again


def test_dry_run_prints_config_environment_and_plan_and_trains_nothing(documents, tmp_path, capsys):
    main(["run", "--out", str(tmp_path), "--data", str(documents), *TINY, "--dry-run"])
    plan, _, rest = capsys.readouterr().out.partition("\n{")
    assert "frozen     embedding and blocks" in plan
    printed = json.loads("{" + rest)
    assert printed["model"]["vocab_size"] == 300
    assert printed["config"]["staging"]["tokens"] == 640
    assert printed["environment"]["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_misspelt_key_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--tokns", "640"])
    assert stopped.value.code == 2
    assert "--tokens" in capsys.readouterr().err


def test_a_users_mistake_is_one_line(documents, tmp_path, forked):
    command = [
        "run",
        "--out",
        str(tmp_path),
        "--data",
        str(documents),
        *TINY,
        "--layer-plan",
        "R",
        "--dry-run",
    ]
    done = subprocess.run([sys.executable, "-m", "staged_training", *command], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "needs 'F' below it" in done.stderr
