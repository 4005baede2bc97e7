"""A run that is stopped, one way or the other, goes on when it is started again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from processes import kill, python, started, wait_for
from toy import manifests, names

from nemologger.checkpoint.verify import problems

SCRIPT = Path(__file__).with_name("train_toy.py")


def _losses(directory: Path) -> dict[int, str]:
    """The loss of each step, the same in every life that took it."""
    losses: dict[int, str] = {}
    for line in (directory / "losses-0.txt").read_text().splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step} has two losses"
    return losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, str]:
    """The losses of a run that nobody stopped."""
    directory = tmp_path_factory.mktemp("straight")
    python(SCRIPT, directory, 60, "--every", 2)
    return _losses(directory)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_from_its_last_checkpoint(tmp_path, straight, how):
    checkpoints = tmp_path / "toy" / "checkpoints"
    with started(SCRIPT, tmp_path, 60, "--every", 2, "--pause", 0.02) as process:
        wait_for(lambda: any(checkpoints.glob("*-last/manifest.json")))
        process.send_signal(how)
        code = process.wait(timeout=60)
    assert code == {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    whole = [name for name in names(checkpoints) if (checkpoints / name / "manifest.json").exists()]
    assert whole
    assert all(problems(checkpoints / name) == [] for name in whole)
    done = python(SCRIPT, tmp_path, 60, "--every", 2)
    log = (tmp_path / "toy" / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert "resuming from" in log, done.stdout + done.stderr
    assert _losses(tmp_path) == straight
    assert max(m.step for m in manifests(checkpoints).values()) == 60
    assert not [name for name in names(checkpoints) if "unfinished" in name or name.startswith(".")]


@pytest.mark.parametrize("beside", [False, True])
def test_kills_at_random_moments(tmp_path, straight, beside):
    moments = random.Random(0)
    for _ in range(3):
        with started(SCRIPT, tmp_path, 60, "--every", 2, "--pause", 0.03, *["--beside"] * beside) as process:
            lines = _count(tmp_path)
            wait_for(lambda lines=lines: _count(tmp_path) > lines)
            time.sleep(moments.uniform(0, 0.5))
            kill(process)
    python(SCRIPT, tmp_path, 60, "--every", 2)
    assert _losses(tmp_path) == straight
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert [name for name in names(checkpoints) if name.endswith("last")] == ["step=60-last"]
    assert len(names(checkpoints)) == 3
    assert all(problems(checkpoints / name) == [] for name in names(checkpoints))


def _count(directory: Path) -> int:
    path = directory / "losses-0.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    with started(SCRIPT, tmp_path, 500, "--every", 2, "--pause", 0.05):
        wait_for((tmp_path / "losses-0.txt").exists)
        second = python(SCRIPT, tmp_path, 500, "--every", 2, check=False)
    assert second.returncode != 0
    assert "another run is writing to" in second.stderr
