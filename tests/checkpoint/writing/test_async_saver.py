"""What can go wrong before the first save; what rank 0 does between the steps of training while others write."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from contextlib import closing

import pytest
from helpers.engine import faults, snapshot_of

from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.writing import in_flight
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.disk import LocalDisk
from nemologger.errors import SaveFailedError, SilentRankError
from nemologger.ranks import Failure, SingleProcess


class _OtherLosesItsWriter(SingleProcess):
    """The writer of another rank has died: that rank cannot say what was written."""

    def exchange(self, value, answer):
        records = isinstance(value, dict) and any(isinstance(one, FileRecord) for one in value.values())
        others = [Failure.of(SaveFailedError("the writer process has died"), 1)] if records else []
        return answer([value, *others])


def test_what_rank_zero_has_published_is_saved_though_another_loses_its_writer_after_that(tmp_path):
    with closing(AsyncSaver(LocalDisk(), _OtherLosesItsWriter())) as saver:
        saver.start(snapshot_of(1), tmp_path / "a", Manifest(1, 0))
        while saver.poll() is None:
            time.sleep(0.01)
        published = saver.finish()
        assert published is not None
        assert published.files
        saver.start(snapshot_of(2), tmp_path / "b", Manifest(2, 0))
        with pytest.raises(SaveFailedError, match="rank 1: the writer process has died"):  # not published yet
            saver.finish()


class _GoesSilent(SingleProcess):
    """There is a rank that does not answer any more, from the moment that is set."""

    silent = False

    def exchange(self, value, answer):
        if self.silent:
            raise SilentRankError("rank 1 did not answer")
        return answer([value])


def test_when_a_rank_dies_while_all_wait_what_is_written_is_published_all_the_same(tmp_path, monkeypatch):
    """Whoever waits is told at once, with the own writer at work: that may be all that is missing."""
    with closing(AsyncSaver(LocalDisk(), _GoesSilent())) as saver:
        saver.prepare(snapshot_of(1))
        os.kill(saver._equipment.layout.writer.pid, signal.SIGSTOP)
        saver.start(snapshot_of(1), tmp_path / "a", Manifest(1, 0))
        monkeypatch.setattr(in_flight, "TURN", 0.05)
        monkeypatch.setattr(_GoesSilent, "silent", True)
        with pytest.raises(SilentRankError):
            saver.finish()
        os.kill(saver._equipment.layout.writer.pid, signal.SIGCONT)
        assert saver.finish_alone(others_are_there=False) is not None
    assert faults(tmp_path / "a") == []


def test_where_no_thread_can_be_started_saves_are_not_beside_training():
    """Whoever prepares goes on with synchronous saves after this error, and ends with any other."""
    gc.collect()  # what other tests have left is not to go meanwhile
    descriptors = os.listdir("/proc/self/fd")
    before = threading.stack_size(1 << 47)  # nobody has so much
    try:
        with pytest.raises(SaveFailedError, match="could not be set up: RuntimeError: can't start new thread"):
            AsyncSaver(LocalDisk(), SingleProcess()).prepare(snapshot_of(1))
    finally:
        threading.stack_size(before)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
