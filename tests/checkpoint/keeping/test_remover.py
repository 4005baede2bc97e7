"""What is removed stops to count at once, and is gone after wait()."""

from __future__ import annotations

import logging
import threading

from helpers.disks import FailingDisk
from helpers.engine import names_in, newest_in, save

from nemologger.checkpoint.commit import tidy
from nemologger.checkpoint.keeping.remover import Remover
from nemologger.disk import LocalDisk


class _Held(LocalDisk):
    """Removes directories only when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def remove(self, path):
        if path.is_dir() and not path.is_symlink():
            assert self.go.wait(30)
        super().remove(path)


def test_it_stops_to_count_at_once_and_goes_later(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"s{step}", step)
    disk = _Held()
    remover = Remover(disk)
    remover.remove(tmp_path / "s2")
    assert newest_in(tmp_path).manifest.step == 1
    assert (tmp_path / "s2" / "weights").exists()
    assert (tmp_path / "s2-unfinished").exists()
    disk.go.set()
    remover.wait()
    assert names_in(tmp_path) == {"s1"}


def test_what_a_dead_run_did_not_get_to_is_cleaned_up_by_the_next(tmp_path):
    save(tmp_path / "s1", 1)
    disk = _Held()
    remover = Remover(disk)
    remover.remove(tmp_path / "s1")
    tidy(LocalDisk(), tmp_path)
    assert names_in(tmp_path) == set()
    disk.go.set()
    remover.wait()


def test_links_and_what_is_not_there_go_at_once(tmp_path):
    save(tmp_path / "s1", 1)
    (tmp_path / "s1-last").symlink_to("s1")
    remover = Remover(LocalDisk())
    remover.remove(tmp_path / "s1-last")
    remover.remove(tmp_path / "never")
    assert names_in(tmp_path) == {"s1"}
    remover.wait()


def test_a_failure_is_a_warning_whichever_call_it_is(tmp_path, caplog):
    for at in range(12):
        directory = tmp_path / str(at)
        directory.mkdir()
        save(directory / "s1", 1)
        disk = FailingDisk(at)
        remover = Remover(disk)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            remover.remove(directory / "s1")
            remover.wait()
        if not disk.has_failed:
            return
        assert "could not be removed" in caplog.text
    raise AssertionError("it never came to an end")
