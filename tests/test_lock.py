"""One live run for a directory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
from processes import started, wait_for

from nemologger.errors import DirectoryInUseError
from nemologger.lock import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from nemologger.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1])).take()
(Path(sys.argv[1]) / "held").touch()
time.sleep(60)
"""


@pytest.fixture
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "hold.py"
    path.write_text(HOLD)
    return path


def test_a_second_process_is_told_who_holds_it_and_it_dies_with_its_owner(tmp_path, script):
    with started(script, tmp_path) as process:
        wait_for((tmp_path / "held").exists)
        with pytest.raises(DirectoryInUseError, match=rf"process {process.pid} on .*another name or version"):
            DirectoryLock(tmp_path).take()
    lock = DirectoryLock(tmp_path)  # the process was killed
    lock.take()
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held"]


def test_taking_and_releasing_twice_is_fine(tmp_path):
    lock = DirectoryLock(tmp_path)
    lock.take()
    lock.take()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_forked_does_not_keep_it(tmp_path):
    lock = DirectoryLock(tmp_path)
    lock.take()
    stop = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=stop.wait, args=(30,))
    child.start()
    try:
        lock.release()
        take = f"DirectoryLock(Path({str(tmp_path)!r})).take()"
        code = f"from pathlib import Path; from nemologger.lock import DirectoryLock; {take}"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
    finally:
        stop.set()
        child.join()
