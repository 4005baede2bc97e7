"""One live run for a directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import started, wait_for

from nemologger.disk.lock import _HELD, FILE, DirectoryLock, taken_over_by
from nemologger.errors import ConfigurationError, DirectoryInUseError

HOLD = """
import sys, time
from pathlib import Path
from nemologger.disk.lock import FILE, DirectoryLock
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
    assert not taken_elsewhere(tmp_path)


def test_its_file_goes_with_the_owner_unless_the_one_before_may_ask_for_it(tmp_path, script):
    lock = DirectoryLock(tmp_path)
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    with started(script, tmp_path):
        wait_for((tmp_path / "held").exists)
    before = (tmp_path / FILE).read_text()
    for _ in range(2):  # killed, or so it seems
        lock = DirectoryLock(tmp_path)
        lock.take()
        lock.release()
        assert (tmp_path / FILE).read_text() not in (before, "")


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
        code = f"from pathlib import Path; from nemologger.disk.lock import FILE, DirectoryLock; {take}"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
    finally:
        stop.set()
        child.join()


def taken_elsewhere(directory) -> bool:
    """Whether another process is refused."""
    code = (
        "import sys; from pathlib import Path; from nemologger.errors import DirectoryInUseError\n"
        "from nemologger.disk.lock import FILE, DirectoryLock\n"
        "try: DirectoryLock(Path(sys.argv[1])).take()\n"
        "except DirectoryInUseError: sys.exit(7)\n"
    )
    code = subprocess.run([sys.executable, "-c", code, str(directory)], env=os.environ, timeout=120).returncode
    assert code in (0, 7)
    return code == 7


def test_two_in_one_process_hold_it_until_the_last_has_released_it(tmp_path):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path / ".." / tmp_path.name)
    first.take()
    second.take()
    first.release()
    assert (tmp_path / ".lock").exists()
    assert taken_elsewhere(tmp_path)
    second.release()
    assert not (tmp_path / ".lock").exists()
    assert not taken_elsewhere(tmp_path)


def test_a_copy_of_the_directory_does_not_release_it(tmp_path):
    lock = DirectoryLock(tmp_path / "run")
    (tmp_path / "run").mkdir()
    lock.take()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert taken_elsewhere(tmp_path / "run")
    lock.release()


def test_a_directory_that_was_made_anew_is_locked_anew(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    old, new = DirectoryLock(directory), DirectoryLock(directory)
    old.take()
    shutil.rmtree(directory)
    directory.mkdir()
    new.take()
    old.release()
    assert taken_elsewhere(directory)
    new.release()
    assert list(directory.iterdir()) == []


def test_a_directory_that_was_copied_back_is_locked_anew(tmp_path):
    directory = tmp_path / "runs"
    directory.mkdir()
    lock = DirectoryLock(directory)
    lock.take()
    shutil.move(directory, tmp_path / "aside")
    shutil.copytree(tmp_path / "aside", directory)
    lock.hold()
    assert taken_elsewhere(directory)
    assert taken_over_by(directory) == ""
    lock.release()
    assert not (directory / FILE).exists()


@pytest.mark.parametrize("other", [False, True])
def test_who_finds_the_file_gone_takes_it_again_unless_somebody_has_it(tmp_path, script, caplog, other):
    lock = DirectoryLock(tmp_path)
    lock.take()
    lock.hold()
    (tmp_path / FILE).unlink()
    if other:
        with started(script, tmp_path):
            wait_for((tmp_path / "held").exists)
            lock.hold()
            lock.hold()
        assert caplog.text.count("could not be locked") == 1
    else:
        lock.hold()
        assert taken_elsewhere(tmp_path)
        assert caplog.text == ""
    lock.release()
    assert not (tmp_path / FILE).exists() or other


FORK = """
import os, sys, time
from pathlib import Path
from nemologger.disk.lock import FILE, DirectoryLock
DirectoryLock(Path(sys.argv[1])).take()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
(Path(sys.argv[1]) / "held").touch()
time.sleep(60)
"""


def test_it_dies_with_its_owner_though_a_child_lives_on(tmp_path, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "fork.py"
    script.write_text(FORK)
    with started(script, tmp_path) as process:
        wait_for((tmp_path / "held").exists)
        process.kill()
        process.wait(timeout=60)
        os.killpg(process.pid, 0)  # its child is there
        lock = DirectoryLock(tmp_path)
        lock.take()
        lock.release()


def test_a_holder_elsewhere_is_waited_for_in_case_it_has_crashed(tmp_path, script, monkeypatch, caplog):
    with started(script, tmp_path) as process:
        wait_for((tmp_path / "held").exists)
        (tmp_path / ".lock").write_text("process 1 on another-host")
        monkeypatch.setattr("nemologger.disk.lock._LOOK_EVERY", 0.05)
        monkeypatch.setattr("nemologger.disk.lock._LEASE", 0.2)
        with pytest.raises(DirectoryInUseError, match=r"process 1 on another-host.* gone for good, remove .*/\.lock, "):
            DirectoryLock(tmp_path).take()
        monkeypatch.setattr("nemologger.disk.lock._LEASE", 60.0)
        waiting = DirectoryLock(tmp_path)
        # It is given up, as a server does when it hears no more of a host, after the first look.
        sleep = time.sleep
        monkeypatch.setattr("nemologger.disk.lock.time.sleep", lambda seconds: (process.kill(), sleep(seconds)))
        waiting.take()
        waiting.release()
    assert "which may have ended: waiting for up to 60 s" in caplog.text


def test_it_can_be_taken_on_a_full_disk(tmp_path):
    """Whoever holds it may remove there what a dead run has left, which makes room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lock = DirectoryLock(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # fails a write as a full disk does
    try:
        lock.take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_that_its_file_cannot_be_removed_does_not_replace_what_ends_a_run(tmp_path, monkeypatch):
    """A disk that has become read-only: what the run is to end with is that it could not save."""

    def read_only(path, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    lock = DirectoryLock(tmp_path)
    lock.take()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        lock.release()
    again = DirectoryLock(tmp_path)
    again.take()  # it was given back all the same
    again.release()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_file_that_goes_while_it_is_opened_is_made_anew(tmp_path, monkeypatch, code):
    """sshfs asks whether it is there, and then opens it."""
    really, gone = os.open, [tmp_path / FILE] * 2

    def goes(path, *arguments):
        if path in gone:
            gone.remove(path)
            raise OSError(code, os.strerror(code), str(path))
        return really(path, *arguments)

    monkeypatch.setattr(os, "open", goes)
    lock = DirectoryLock(tmp_path)
    lock.take()
    assert taken_elsewhere(tmp_path)
    lock.release()
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        DirectoryLock(tmp_path / "none").take()


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / FILE).mkdir()  # what root, who may write everywhere, cannot either
    with pytest.raises(ConfigurationError, match=re.escape(f"{tmp_path} cannot be written to: Is a directory")):
        DirectoryLock(tmp_path).take()


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.ENOTCONN]
)
def test_where_no_lock_can_be_had_the_run_goes_on_and_it_is_said_once(tmp_path, monkeypatch, caplog, code):
    def refuse(*arguments):
        raise OSError(code, os.strerror(code))

    caplog.set_level(logging.INFO, "nemologger")
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    for _ in range(2):
        lock = DirectoryLock(tmp_path)
        lock.take()
        lock.release()
    has_none = code not in (errno.EIO, errno.ENOTCONN)
    what = "has no locks" if has_none else f"{tmp_path} could not be locked: {os.strerror(code)}. The run goes on"
    assert [record.levelname for record in caplog.records] == ["INFO" if has_none else "WARNING"]
    assert what in caplog.text


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_file_that_is_remembered_after_its_owner_has_removed_it_is_asked_for_again(
    tmp_path, monkeypatch, caplog, code
):
    """For a second, on GlusterFS. To train without a lock would let a third run in."""
    end, really = time.monotonic() + 1.5, fcntl.fcntl

    def remembers(*arguments):
        if time.monotonic() < end:
            raise OSError(code, os.strerror(code))
        return really(*arguments)

    monkeypatch.setattr(fcntl, "fcntl", remembers)
    monkeypatch.setattr(fcntl, "lockf", remembers)
    lock = DirectoryLock(tmp_path)
    lock.take()
    assert caplog.text == ""
    assert taken_elsewhere(tmp_path)
    lock.release()


def test_whoever_cannot_read_who_holds_it_is_refused_all_the_same(tmp_path, script, monkeypatch):
    """A mount may let nobody read what is open for writing too."""

    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pread", refuse)
    monkeypatch.setattr("nemologger.disk.lock._LOOK_EVERY", 0.05)
    monkeypatch.setattr("nemologger.disk.lock._LEASE", 0.1)
    with started(script, tmp_path):
        wait_for((tmp_path / "held").exists)
        with pytest.raises(DirectoryInUseError, match="unknown process"):
            DirectoryLock(tmp_path).take()


def test_a_file_that_is_never_seen_at_its_path_does_not_hold_up_the_start(tmp_path, monkeypatch, caplog):
    stat = Path.stat

    def fails(path, **options):
        if path.name == FILE:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **options)

    monkeypatch.setattr("nemologger.disk.lock._PAUSE", 0.0)
    monkeypatch.setattr(Path, "stat", fails)
    DirectoryLock(tmp_path).take()
    assert "could not be locked" in caplog.text


def test_a_disk_that_fails_when_it_is_given_back_does_not_replace_what_ends_a_run(tmp_path, monkeypatch):
    close = os.close

    def fails(descriptor):
        close(descriptor)
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    lock = DirectoryLock(tmp_path)
    lock.take()
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fails)
        lock.release()
    assert not taken_elsewhere(tmp_path)


def test_who_has_lost_it_is_told_who_has_it(tmp_path, script):
    lock = DirectoryLock(tmp_path)
    lock.take()
    assert taken_over_by(tmp_path) == ""
    (tmp_path / FILE).unlink()
    assert taken_over_by(tmp_path) == ""  # nobody yet
    with started(script, tmp_path) as process:
        wait_for((tmp_path / "held").exists)
        assert taken_over_by(tmp_path).startswith(f"process {process.pid} on ")
    lock.hold()
    assert taken_over_by(tmp_path).startswith(f"process {process.pid} on "), "it may have saved there"
    lock.release()
    assert taken_over_by(tmp_path) == ""


def test_who_stood_still_is_told_who_has_had_it_since(tmp_path, monkeypatch):
    """Another container, with the same number of the process and the same name of the host."""
    lock, other = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    lock.take()
    mine = dict(_HELD)
    fcntl.fcntl(mine[tmp_path / FILE].descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
    _HELD.clear()
    other.take()
    other.release()
    _HELD.update(mine)
    lock.hold()
    assert taken_over_by(tmp_path).startswith(f"process {os.getpid()} on ")
    lock.release()
    assert (tmp_path / FILE).exists(), "the next one may ask for it, too"


def test_to_ask_who_has_it_does_not_release_a_lock_of_the_process(tmp_path, monkeypatch):
    """The one that is taken where a lock of an opening cannot be had."""
    really = fcntl.fcntl

    def knows_none(descriptor, command, *arguments):
        if command == fcntl.F_OFD_SETLK:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", knows_none)
    lock = DirectoryLock(tmp_path)
    lock.take()
    assert taken_over_by(tmp_path) == ""
    assert taken_elsewhere(tmp_path)
    (tmp_path / FILE).unlink()
    lock.hold()
    assert taken_over_by(tmp_path) == ""
    assert taken_elsewhere(tmp_path)
    lock.release()
