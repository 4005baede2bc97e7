"""A run whose host stood still, or was cut off, until another one had its directory: it leaves that alone from then on."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers.engine import faults, newest_in
from processes import started, wait_for

HELPERS = Path(__file__).with_name("helpers")
TRAIN = Path(__file__).with_name("train_toy.py")


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_that_was_taken_for_dead_publishes_and_removes_nothing_more(tmp_path, beside):
    checkpoints = tmp_path / "toy" / "checkpoints"
    how = ["--every", 3, *["--beside"] * beside]
    with started(HELPERS / "frozen_run.py", tmp_path, 60, *how, "--pause", 0.1) as frozen:
        wait_for(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED)
        assert not (checkpoints / "step=6" / "manifest.json").exists()
        with started(TRAIN, tmp_path, 200, *how, "--pause", 0.3) as fresh:
            wait_for((checkpoints / "step=6" / "manifest.json").exists)
            published = (checkpoints / "step=6" / "manifest.json").read_bytes()
            os.killpg(frozen.pid, signal.SIGCONT)
            wait_for(lambda: frozen.poll() is not None or (checkpoints / "step=12").exists())
            with suppress(FileNotFoundError):  # the fresh one may have removed it
                assert (checkpoints / "step=6" / "manifest.json").read_bytes() == published
            assert frozen.wait(timeout=60) == 1
            told = frozen.stdout.read()
            assert f"another run has had {checkpoints} since this one began (process {fresh.pid} on " in told
            step = newest_in(checkpoints).manifest.step
            wait_for(lambda: newest_in(checkpoints).manifest.step > step)
            time.sleep(0.1)
            assert fresh.poll() is None
    newest = newest_in(checkpoints)
    assert faults(newest.path) == []


def test_it_leaves_it_alone_when_the_other_one_has_ended(tmp_path):
    checkpoints = tmp_path / "toy" / "checkpoints"
    with started(HELPERS / "frozen_run.py", tmp_path, 60, "--every", 3, "--pause", 0.05) as frozen:
        wait_for(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED)
        with started(TRAIN, tmp_path, 12, "--every", 3) as fresh:
            assert fresh.wait(timeout=60) == 0
        names = sorted(path.name for path in checkpoints.iterdir())
        published = (checkpoints / "step=9" / "manifest.json").read_bytes()
        os.killpg(frozen.pid, signal.SIGCONT)
        assert frozen.wait(timeout=60) == 1
        told = frozen.stdout.read()
    assert f"another run has had {checkpoints} since this one began (process {fresh.pid} on " in told
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    assert (checkpoints / "step=9" / "manifest.json").read_bytes() == published
