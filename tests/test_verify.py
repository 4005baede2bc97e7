"""``verify_checkpoint``, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from toy import ToyModel, loader, quiet_trainer

from nemologger import (
    DamagedCheckpointError,
    ModelCheckpoint,
    NotFoundError,
    UnfinishedCheckpointError,
    verify_checkpoint,
)
from nemologger.verify import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saves = ModelCheckpoint(dirpath=directory, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(ToyModel(), loader(), loader())
    return directory.parent


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run") / "checkpoints" / "x"


def test_a_whole_one(checkpoint, capsys):
    assert verify_checkpoint(checkpoint).ok
    assert verify_checkpoint(checkpoint / "weights", deep=False).ok
    assert main([str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{checkpoint} (step ")  # in one piece
    assert "weights/__0_0.distcp" in shown


def test_a_flipped_byte_is_named(checkpoint, capsys):
    path = checkpoint / "weights" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[99] ^= 1
    path.unlink()
    path.write_bytes(content)
    assert [p.file for p in verify_checkpoint(checkpoint).problems] == ["weights/__0_0.distcp"]
    assert verify_checkpoint(checkpoint, deep=False).ok
    assert main([str(checkpoint)]) == 1
    assert "have changed since they were written" in capsys.readouterr().out
    assert main([str(checkpoint), "--shallow"]) == 0


def test_what_cannot_be_told(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="no manifest"):
        verify_checkpoint(checkpoint)
    checkpoint.with_name("x-unfinished").touch()
    with pytest.raises(UnfinishedCheckpointError, match="never finished"):
        verify_checkpoint(checkpoint)
    with pytest.raises(NotFoundError):
        verify_checkpoint(checkpoint / "gone")


def test_a_whole_run(checkpoint, capsys):
    assert main([str(checkpoint.parent.parent)]) == 0
    assert capsys.readouterr().out.count("manifest") == 0
    (checkpoint / "weights" / "common.pt").unlink()
    assert main([str(checkpoint.parent)]) == 1
    assert "is missing" in capsys.readouterr().out
    assert main([str(checkpoint.parent / "nothing")]) == 2


def test_several_runs(checkpoint, tmp_path, capsys):
    """A directory of experiments, with a run below a name and one below a version."""
    experiments = tmp_path / "experiments"
    for run in ("a", "b/v1"):
        shutil.copytree(checkpoint.parents[1], experiments / run)
    assert main([str(experiments)]) == 0
    assert main([str(experiments / "b")]) == 0
    assert "4 checkpoints: 4 ok, 0 not" in capsys.readouterr().out
    assert main([str(experiments / "a"), str(experiments / "b")]) == 0
    assert main([str(experiments / "a"), str(experiments / "c")]) == 2
    assert "there is no checkpoint at" in capsys.readouterr().out
    with pytest.raises(NotFoundError, match="finds those below a directory"):
        verify_checkpoint(experiments / "a")
    (experiments / "old.ckpt").touch()  # hides nothing that is below
    damaged = experiments / "b" / "v1" / "checkpoints" / "x"
    (damaged / "manifest.json").unlink()
    assert main([str(experiments)]) == 1
    shown = capsys.readouterr().out
    assert shown.endswith(f"5 checkpoints: 3 ok, 2 not\nnot ok: {experiments}/old.ckpt\nnot ok: {damaged}\n")


def test_a_file_of_lightning_is_said_to_be_one(tmp_path, capsys):
    file = tmp_path / "epoch=1.ckpt"
    file.touch()
    for path in (file, tmp_path):
        assert main([str(path)]) == 1
        assert f"{file} is a file: only checkpoints of nemologger" in capsys.readouterr().out


def test_as_a_command(checkpoint):
    done = subprocess.run([sys.executable, "-m", "nemologger.verify", checkpoint], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
