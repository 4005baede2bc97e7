"""Who waits for a save beside training, and is interrupted, does not lose it."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.disks import FailingDisk
from helpers.engine import faults, names_in, snapshot_of
from processes import wait_for

from nemologger.checkpoint.keeping.decision import Decision
from nemologger.checkpoint.keeping.keeper import Keeper
from nemologger.checkpoint.keeping.retention import Policy
from nemologger.checkpoint.keeping.shelf import Shelf
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.writing import async_saver, in_flight, plan, progress
from nemologger.disk import Disk, LocalDisk
from nemologger.errors import SaveFailedError
from nemologger.ranks import SingleProcess


class _Interrupts(logging.Handler):
    """Ctrl-C, at the moment when somebody begins to wait."""

    def emit(self, record: logging.LogRecord) -> None:
        if "waiting for checkpoint" in record.getMessage():
            logging.getLogger(progress.__name__).removeHandler(self)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    logger, handler = logging.getLogger(progress.__name__), _Interrupts()
    level, before = logger.level, signal.signal(signal.SIGINT, signal.default_int_handler)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)
    signal.signal(signal.SIGINT, before)


def under_way(directory: Path, disk: Disk | None = None) -> tuple[Keeper, int]:
    """A keeper whose save of step 1 is under way, and the writer process, which is stopped."""
    keeper = Keeper(disk or LocalDisk(), SingleProcess(), Policy(1), link=False, shelf=Shelf(), beside=True)
    keeper.prepare(snapshot_of(1))
    writer = keeper._beside._equipment.layout.writer.pid
    os.kill(writer, signal.SIGSTOP)
    decision = Decision(str(directory / "a"), str(directory / "a-last"), 0.5, ranked=True)
    keeper.start(snapshot_of(1), decision, Manifest(1, 0, ranked=True), None, set())
    return keeper, writer


def is_kept(keeper: Keeper, directory: Path) -> bool:
    assert not keeper.busy
    assert not keeper._beside.busy
    assert names_in(directory) == {"a", "a-last"}
    assert {kept.path for kept in keeper.shelf.kept} == {str(directory / name) for name in ("a", "a-last")}
    return keeper.shelf.last == str(directory / "a-last") and not faults(directory / "a") + faults(directory / "a-last")


def test_ctrl_c_while_training_waits_for_the_writer_does_not_lose_the_save(tmp_path, ctrl_c):
    keeper, writer = under_way(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            keeper.finish()
        assert keeper.busy
        os.kill(writer, signal.SIGCONT)
        keeper.finish_alone(others_are_there=True)
        assert is_kept(keeper, tmp_path)
    finally:
        os.kill(writer, signal.SIGCONT)
        keeper.close()


def test_a_save_whose_writer_hangs_does_not_keep_later_ones_from_being_made(tmp_path, monkeypatch):
    """With ``on_busy="skip"`` they would be skipped until training ends."""
    monkeypatch.setattr(in_flight, "STALLED", 0.2)
    monkeypatch.setattr(in_flight, "TURN", 0.05)
    keeper, _ = under_way(tmp_path)
    try:
        assert not keeper.can_finish_now()
        wait_for(keeper.can_finish_now)
        with pytest.raises(SaveFailedError, match="the storage does not answer"):
            keeper.finish()
        keeper.finish_removals()
        assert names_in(tmp_path) == set()
    finally:
        keeper.close()


class _Interrupting(LocalDisk):
    """Ctrl-C comes once, before or after a file of that name is written."""

    def __init__(self, name: str, *, before: bool) -> None:
        self.name, self.before = name, before

    def write(self, path, parts):
        if path.name != self.name:
            super().write(path, parts)
            return
        self.name = ""
        if not self.before:
            super().write(path, parts)
        raise KeyboardInterrupt


def _wait(keeper: Keeper, *, polls: bool) -> None:
    while polls:
        keeper.poll()
    keeper.finish()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["manifest.json", "a-last-unfinished"])
@pytest.mark.parametrize("polls", [True, False])
def test_ctrl_c_while_it_is_published_or_linked_does_not_lose_it(tmp_path, name, before, polls):
    keeper, writer = under_way(tmp_path, _Interrupting(name, before=before))
    try:
        os.kill(writer, signal.SIGCONT)
        with pytest.raises(KeyboardInterrupt):
            _wait(keeper, polls=polls)
        keeper.finish_alone(others_are_there=True)
        assert is_kept(keeper, tmp_path)
    finally:
        keeper.close()


class _Clock:
    """A hundred seconds pass at every look at it; ``then`` is called whenever somebody sleeps."""

    def __init__(self, then: Any) -> None:
        self.now, self.then = 0.0, then

    def monotonic(self) -> float:
        self.now += 100.0
        return self.now

    def sleep(self, seconds: float) -> None:
        self.then()


def test_after_an_exception_a_save_that_gets_on_is_waited_for_however_long_it_takes(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, progress.__name__)
    keeper, writer = under_way(tmp_path)
    connection = keeper._beside._equipment.layout.writer._connection
    looks = 0

    def then() -> None:
        nonlocal looks
        looks += 1
        if looks < 30:
            (tmp_path / "a" / "weights" / ".written.partial").write_bytes(b"x" * looks)
        elif looks == 30:
            (tmp_path / "a" / "weights" / ".written.partial").unlink()
            os.kill(writer, signal.SIGCONT)
            assert connection.poll(60)

    clock = _Clock(then)
    try:
        for module in (async_saver, in_flight, progress):
            monkeypatch.setattr(module, "time", clock)
        keeper.finish_alone(others_are_there=False)
        assert clock.now > 3000
        assert is_kept(keeper, tmp_path)
        assert caplog.text.count("MB written") > 20
    finally:
        os.kill(writer, signal.SIGCONT)
        keeper.close()


def test_after_an_exception_a_save_that_does_not_get_on_is_given_up(tmp_path, monkeypatch, caplog):
    keeper, writer = under_way(tmp_path)
    clock = _Clock(lambda: None)
    try:
        for module in (async_saver, in_flight, progress):
            monkeypatch.setattr(module, "time", clock)
        keeper.finish_alone(others_are_there=True)
        assert 600 < clock.now < 2000
        assert "a, which was being written, is lost" in caplog.text
        assert not keeper.busy
    finally:
        os.kill(writer, signal.SIGCONT)
        keeper.close()
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_what_the_writer_raised_is_shown_with_its_traceback(tmp_path):
    keeper, writer = under_way(tmp_path)
    try:
        (tmp_path / "a" / "weights" / "__0_0.distcp").mkdir()
        os.kill(writer, signal.SIGCONT)
        with pytest.raises(SaveFailedError, match="IsADirectoryError") as caught:
            keeper.finish()
    finally:
        keeper.close()
    shown = "".join(traceback.format_exception(caught.value))
    assert "in the writer process" in shown
    assert "in write_image" in shown
    assert not keeper.busy


@pytest.mark.parametrize("beside", [False, True])
def test_what_a_failed_save_left_on_a_disk_that_was_away_goes_with_the_next_save(tmp_path, beside):
    disk = FailingDisk(1000, forever=True)
    keeper = Keeper(disk, SingleProcess(), Policy(3), link=False, shelf=Shelf(), beside=beside)

    def save(step: int) -> None:
        decision = Decision(str(tmp_path / f"s{step}"), None, None, ranked=True)
        keeper.start(snapshot_of(step), decision, Manifest(step, 0, ranked=True), None, set())
        keeper.finish()

    save(1)
    disk.calls, disk.at = 0, 5  # when there is a marker, and a directory
    with pytest.raises(SaveFailedError, match="No space left"):
        save(2)
    assert names_in(tmp_path) == {"s1", "s2", "s2-unfinished"}
    with pytest.raises(SaveFailedError, match="No space left"):
        save(3)
    disk.at = 1000
    save(4)
    keeper.close()
    assert names_in(tmp_path) == {"s1", "s4"}


def test_the_last_save_of_a_run_that_saves_beside_training_goes_by_the_plan_there_is(tmp_path, monkeypatch):
    """A new one takes seconds where there are very many tensors, and the time that a job has left may be short."""
    made = []
    files_of = plan.files_of
    monkeypatch.setattr(plan, "files_of", lambda *given, **named: made.append(given) or files_of(*given, **named))
    keeper = Keeper(LocalDisk(), SingleProcess(), Policy(3), link=False, shelf=Shelf(), beside=True)
    for step, save in enumerate((keeper.start, keeper.save), start=1):
        decision = Decision(str(tmp_path / f"s{step}"), None, None, ranked=True)
        save(snapshot_of(step), decision, Manifest(step, 0, ranked=True), None, set())
    keeper.close()
    assert len(made) == 1
    assert not faults(tmp_path / "s1") + faults(tmp_path / "s2")
