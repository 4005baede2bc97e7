"""The writer process ends with the process that started it, and publishes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemologger.checkpoint.arena import Arena
from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.shares import Piece
from nemologger.checkpoint.weights import lay_out
from nemologger.checkpoint.writer import Writer
from nemologger.checkpoint.writer_main import Job
from nemologger.errors import SaveFailedError

PARENT = """
import torch, time
from nemologger.checkpoint.arena import Arena
from nemologger.checkpoint.writer import Writer
arena = Arena({}, {})
writer = Writer(arena)
print(writer.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def arena():
    tensors = {"w": torch.arange(10.0)}
    arena = Arena({"file": lay_out([Piece("w", (0,), (10,), 40)], tensors)}, tensors)
    arena.stage(lambda piece: tensors[piece.key])
    yield arena
    arena.close()


def _gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def _job(arena: Arena, directory: Path) -> Job:
    return Job(str(directory), tuple((i.name, i.offset, i.size) for i in arena.images), {"deep/er/small": b"small"})


def test_it_writes_what_it_is_told_and_records_it(arena, tmp_path):
    writer = Writer(arena)
    try:
        writer.submit(_job(arena, tmp_path))
        outcome = writer.outcome(None)
        assert outcome is not None
        assert outcome.error == ""
        assert set(outcome.records) == {"file", "deep/er/small"}
        assert outcome.records["deep/er/small"] == FileRecord(5, outcome.records["deep/er/small"].blocks)
        assert (tmp_path / "file").stat().st_size == outcome.records["file"].size
    finally:
        writer.close()
    assert _gone(writer.pid)


def test_what_goes_wrong_comes_back_with_its_traceback(arena, tmp_path):
    (tmp_path / "file").mkdir()
    writer = Writer(arena)
    try:
        writer.submit(_job(arena, tmp_path))
        outcome = writer.outcome(None)
        assert outcome is not None
        assert "IsADirectoryError" in outcome.error
        assert "write_image" in outcome.details
    finally:
        writer.close()


def test_its_death_is_an_error_that_says_so(arena, tmp_path):
    writer = Writer(arena)
    os.kill(writer.pid, signal.SIGKILL)
    assert _gone_or_zombie(writer)
    with pytest.raises(SaveFailedError, match=r"has died \(exit code -9\)"):
        _perform(writer, _job(arena, tmp_path))
    writer.close()


def _perform(writer: Writer, job: Job) -> None:
    writer.submit(job)
    writer.outcome(None)


def _gone_or_zombie(writer: Writer) -> bool:
    end = time.monotonic() + 20
    while writer.alive and time.monotonic() < end:
        time.sleep(0.01)
    return not writer.alive


def test_it_ends_when_the_process_that_trains_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        parent.kill()
        assert _gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
