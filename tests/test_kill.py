"""A run that is stopped, one way or the other, goes on when it is started again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers.kill_loop import writers
from processes import python, started, wait_for
from toy import losses_of, manifests, names

from nemologger.checkpoint.verify import problems

SCRIPT = Path(__file__).with_name("train_toy.py")
LOOP = Path(__file__).with_name("helpers") / "kill_loop.py"


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, str]:
    """The losses of a run that nobody stopped."""
    directory = tmp_path_factory.mktemp("straight")
    python(SCRIPT, directory, 60, "--every", 2)
    return losses_of(directory)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_from_its_last_checkpoint(tmp_path, straight, how):
    checkpoints = tmp_path / "toy" / "checkpoints"
    with started(SCRIPT, tmp_path, 60, "--every", 2, "--pause", 0.2) as process:
        wait_for(lambda: any(checkpoints.glob("*-last/manifest.json")))
        process.send_signal(how)
        code = process.wait(timeout=150)
        said = process.stdout.read()
    assert code == {signal.SIGINT: 1, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    whole = [name for name in names(checkpoints) if (checkpoints / name / "manifest.json").exists()]
    assert whole
    assert all(problems(checkpoints / name) == [] for name in whole)
    newest = max(m.step for m in manifests(checkpoints).values())
    named = f"step={newest}-last"
    named = named if named in whole else f"step={newest}"  # it may not have come to that
    told = f"the newest checkpoint is {checkpoints}/{named}: "
    assert said.count(told) == (how == signal.SIGINT), said
    done = python(SCRIPT, tmp_path, 60, "--every", 2)
    log = (tmp_path / "toy" / "nemo_log_globalrank-0_localrank-0.txt").read_text()
    assert "resuming from" in log, done.stdout + done.stderr
    assert losses_of(tmp_path) == straight
    assert max(m.step for m in manifests(checkpoints).values()) == 60
    left = [name for name in names(checkpoints) if "unfinished" in name or name.startswith(".")]
    assert set(left) <= {".lock"}, "the file of a run that was killed stays"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_kills_at_random_moments(ranks):
    """With and without loader workers, saving beside training and not. The same script runs for as long as wanted."""
    done = python(LOOP, "--kills", 2, "--ranks", ranks, "--workers", 0, 2, "--both", "--steps", 30, timeout=500)
    assert done.stdout.count(f"\n| {ranks} | ") == 4, done.stdout + done.stderr


def test_a_second_ctrl_c_ends_the_wait_for_storage_that_does_not_answer(tmp_path):
    """The first one waits for the save under way, of which the writer, stopped, writes no more."""
    checkpoints = tmp_path / "toy" / "checkpoints"
    with started(SCRIPT, tmp_path, 500, "--every", 5, "--pause", 0.02, "--beside") as process:
        wait_for(lambda: any(checkpoints.glob("*-last/manifest.json")))
        (writer,) = writers(process.pid)
        os.kill(writer, signal.SIGSTOP)
        before = _log(tmp_path).count(_WAITS)
        for ctrl_c in (1, 2):  # when a save waits for the one before it, and when the end of the run does
            wait_for(lambda n=ctrl_c: _log(tmp_path).count(_WAITS) == before + n)
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 1
    assert "which was being written, is lost; the one before it is still the newest" in _log(tmp_path)
    wait_for(lambda: not Path(f"/proc/{writer}").exists())
    python(SCRIPT, tmp_path, 10, "--every", 5)
    assert max(m.step for m in manifests(checkpoints).values()) >= 10


_WAITS = "waiting for checkpoint"


def _log(directory: Path) -> str:
    return (directory / "toy" / "nemo_log_globalrank-0_localrank-0.txt").read_text()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    with started(SCRIPT, tmp_path, 100_000, "--every", 2, "--pause", 0.05):
        wait_for((tmp_path / "losses-0.txt").exists)
        second = python(SCRIPT, tmp_path, 500, "--every", 2, check=False)
        assert not (tmp_path / "toy" / "run_0").exists()  # the live one's log files stay where it writes them
    assert second.returncode != 0
    assert "another run is writing to" in second.stderr
