"""Complete or absent, whatever call of the disk fails; and what the next run cleans up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest
from helpers.disks import FailingDisk
from helpers.engine import names_in, newest_in, save, step_in

from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.manifest import Manifest, read
from nemologger.checkpoint.verify import problems
from nemologger.disk import LocalDisk
from nemologger.errors import SaveFailedError

MEGATRON = Path(__file__).parents[1] / "fixtures" / "nemo2" / "megatron"
DISK = LocalDisk()


class NoHardLinks(LocalDisk):
    """A file system without them, such as FAT."""

    def link(self, source, target):
        with source.open("rb") as file:
            self.write(target, [file.read()])


def save_with_last(directory: Path, name: str, step: int, disk: LocalDisk) -> None:
    """What the callback does: save, then publish ``-last``."""
    manifest = save(directory / name, step, disk)
    commit.duplicate(disk, directory / name, directory / f"{name}-last", manifest)


def complete_steps(directory: Path) -> set[int]:
    return {found.manifest.step for found in survey(directory) if found.manifest}


def newest_step(directory: Path) -> int:
    return newest_in(directory).manifest.step


def assert_nothing_half_looks_complete(directory: Path) -> None:
    for found in survey(directory):
        assert found.status in (Status.COMPLETE, Status.UNFINISHED), found
        if found.status is Status.COMPLETE:
            assert problems(found.path) == [], found.path


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", ["new", "same"])
def test_a_disk_that_fails_at_any_call_of_a_save(tmp_path, name, forever):
    """Every method, every call: what was there is untouched, and the save after it works."""
    save(tmp_path / "start" / "same", 1)
    at = 0
    while True:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(at))
        disk = FailingDisk(at, forever=forever)
        try:
            save(run / name, 2, disk)
        except SaveFailedError:
            # A disk that is gone for good may take even the undoing of the commit with it.
            assert newest_step(run) == 1 or (forever and newest_step(run) == 2)
            assert 1 in complete_steps(run)
            assert forever or complete_steps(run) == {1}
        else:
            assert newest_step(run) == 2
        assert_nothing_half_looks_complete(run)
        if not disk.has_failed:
            break
        save(run / "next", 3)
        assert newest_step(run) == 3
        published = complete_steps(run)
        commit.tidy(DISK, run)
        assert complete_steps(run) == published or (name == "same" and published - complete_steps(run) == {1})
        assert names_in(run) == {"next", "same"} | ({"new"} if name == "new" and 2 in published else set())
        at += 1
    assert at > 15
    assert names_in(run) == {"same", name}


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("earlier", ["none", "directory", "link"])
def test_a_disk_that_fails_at_any_call_of_a_duplicate(tmp_path, earlier, forever):
    save(tmp_path / "start" / "a", 2)
    if earlier == "directory":
        save(tmp_path / "start" / "a-last", 1)
    elif earlier == "link":
        commit.point(DISK, tmp_path / "start" / "a", tmp_path / "start" / "a-last")
    at = 0
    while True:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(at), symlinks=True)
        disk = FailingDisk(at, forever=forever)
        try:
            commit.duplicate(disk, run / "a", run / "a-last", read(run / "a"))
        except OSError:
            assert (
                not (run / "a-last").is_dir() or problems(run / "a-last") == [] or (run / "a-last-unfinished").exists()
            )
            if earlier == "directory":
                assert 1 in complete_steps(run)
            if not forever:  # all is as it was
                assert names_in(run) == names_in(tmp_path / "start")
                assert (run / "a-last").is_symlink() is (earlier == "link")
        assert newest_step(run) == 2
        assert_nothing_half_looks_complete(run)
        if not disk.has_failed:
            break
        commit.tidy(DISK, run)
        commit.duplicate(DISK, run / "a", run / "a-last", read(run / "a"))
        assert names_in(run) == {"a", "a-last"}
        at += 1
    assert at > 10


def test_a_disk_that_fails_at_any_call_of_a_removal(tmp_path):
    save(tmp_path / "start" / "a", 1)
    save(tmp_path / "start" / "b", 2)
    at = 0
    while True:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(at))
        disk = FailingDisk(at)
        try:
            commit.retract(disk, run / "a")
        except OSError:
            assert disk.has_failed
        assert_nothing_half_looks_complete(run)
        if not disk.has_failed:
            break
        commit.tidy(DISK, run)
        assert names_in(run) in ({"b"}, {"a", "b"})
        assert newest_step(run) == 2
        at += 1
    assert names_in(run) == {"b"}


def test_a_disk_that_fails_while_tidying_can_be_tidied_again(tmp_path):
    save(tmp_path / "start" / "a", 1)
    commit.begin(DISK, tmp_path / "start" / "a")
    at = 0
    while True:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(at))
        disk = FailingDisk(at)
        try:
            commit.tidy(disk, run)
        except OSError:
            assert newest_step(run) == 1
        commit.tidy(DISK, run)
        assert names_in(run) == {"a"}
        assert newest_step(run) == 1
        if not disk.has_failed:
            break
        at += 1
    assert at > 3


def test_one_of_the_same_name_is_replaced(tmp_path):
    save(tmp_path / "a", 1)
    save(tmp_path / "a", 2)
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 2


def test_what_an_earlier_replacement_left_is_not_in_the_way(tmp_path):
    """Its removal failed, and that was only a warning."""
    save(tmp_path / "a", 1)
    at = 0
    while "a-replaced" not in names_in(tmp_path):
        with contextlib.suppress(SaveFailedError):
            save(tmp_path / "a", 2, FailingDisk(at, only=("remove",)))
        at += 1
    save(tmp_path / "a", 3)
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 3


def test_one_of_the_same_name_stays_complete_until_its_successor_is(tmp_path):
    save(tmp_path / "a", 1)
    commit.begin(DISK, tmp_path / "a")
    assert complete_steps(tmp_path) == {1}
    commit.abandon(DISK, tmp_path / "a")
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 1


def test_what_nemo_left_under_the_same_name_is_not_lost_with_a_failed_save(tmp_path):
    """It has no manifest, but it may be the only checkpoint there is."""
    shutil.copytree(MEGATRON / "o1_sync", tmp_path / "a" / "weights")
    before = sorted(path.name for path in (tmp_path / "a" / "weights").iterdir())
    for at in range(12):
        with pytest.raises(SaveFailedError):
            save(tmp_path / "a", 1, FailingDisk(at))
        commit.tidy(DISK, tmp_path)
        assert names_in(tmp_path) == {"a"}, at
        assert sorted(path.name for path in (tmp_path / "a" / "weights").iterdir()) == before, at
    commit.begin(DISK, tmp_path / "a")  # and here the process dies
    commit.tidy(DISK, tmp_path)
    assert sorted(path.name for path in (tmp_path / "a" / "weights").iterdir()) == before
    save(tmp_path / "a", 1)
    assert names_in(tmp_path) == {"a"}


# --- -last ------------------------------------------------------------------------------------------------------------


def test_a_duplicate_shares_its_bytes_and_stands_by_itself(tmp_path):
    save_with_last(tmp_path, "a", 5, DISK)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    for file in files:
        shared = os.path.samefile(tmp_path / "a" / file, tmp_path / "a-last" / file)
        assert shared is (file.name != "manifest.json"), file
    commit.retract(DISK, tmp_path / "a")
    assert names_in(tmp_path) == {"a-last"}
    assert problems(tmp_path / "a-last") == []
    assert step_in(tmp_path / "a-last") == 5


def test_a_duplicate_is_marked_as_last_and_does_not_compete(tmp_path):
    manifest = save(tmp_path / "a", 5, ranked=True, score=0.5)
    commit.duplicate(DISK, tmp_path / "a", tmp_path / "a-last", manifest)
    assert (read(tmp_path / "a-last").last, read(tmp_path / "a-last").ranked) == (True, False)
    assert (read(tmp_path / "a").last, read(tmp_path / "a").ranked) == (False, True)
    assert read(tmp_path / "a-last").score == 0.5


def test_without_hard_links_a_duplicate_is_a_copy(tmp_path):
    save_with_last(tmp_path, "a", 5, NoHardLinks())
    assert not os.path.samefile(tmp_path / "a/weights/common.pt", tmp_path / "a-last/weights/common.pt")
    assert step_in(tmp_path / "a-last") == 5


def test_a_link_is_relative_and_moves_with_its_directory(tmp_path):
    save(tmp_path / "run" / "a", 1)
    commit.point(DISK, tmp_path / "run" / "a", tmp_path / "run" / "a-last")
    assert os.readlink(tmp_path / "run" / "a-last") == "a"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert step_in(tmp_path / "moved" / "a-last") == 1


def test_a_link_is_moved_to_its_next_target(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"step={step}", step)
        commit.point(DISK, tmp_path / f"step={step}", tmp_path / "x-last")
    assert step_in(tmp_path / "x-last") == 2
    assert names_in(tmp_path) == {"step=1", "step=2", "x-last"}


def test_a_link_is_never_written_through(tmp_path):
    """A run that changes from ``"link"`` to directories meets its old link under the name it wants to write."""
    save(tmp_path / "a", 1)
    commit.point(DISK, tmp_path / "a", tmp_path / "a-last")
    save(tmp_path / "a-last", 2)
    assert step_in(tmp_path / "a") == 1
    assert step_in(tmp_path / "a-last") == 2
    assert names_in(tmp_path) == {"a", "a-last"}


def test_a_directory_gives_way_to_a_link(tmp_path):
    save_with_last(tmp_path, "a", 1, DISK)
    commit.point(DISK, tmp_path / "a", tmp_path / "a-last")
    assert (tmp_path / "a-last").is_symlink()
    assert names_in(tmp_path) == {"a", "a-last"}


def test_removing_a_link_leaves_its_target(tmp_path):
    save(tmp_path / "a", 1)
    commit.point(DISK, tmp_path / "a", tmp_path / "a-last")
    commit.retract(DISK, tmp_path / "a-last")
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 1


def test_removing_what_is_not_there_is_fine(tmp_path):
    commit.retract(DISK, tmp_path / "gone")
    assert names_in(tmp_path) == set()


# --- what dead runs leave ---------------------------------------------------------------------------------------------


def test_tidying_removes_what_was_never_finished_and_nothing_else(tmp_path):
    save(tmp_path / "whole", 1)
    save(tmp_path / "marked", 2)
    (tmp_path / "marked-unfinished").touch()
    save(tmp_path / "half", 3)
    (tmp_path / "half" / "manifest.json").unlink()
    (tmp_path / "half-unfinished").touch()
    (tmp_path / "alone-unfinished").touch()
    (tmp_path / ".x-unfinished.partial").touch()
    (tmp_path / "notes-unfinished").mkdir()
    (tmp_path / "plots-replaced").mkdir()
    (tmp_path / "foreign" / "weights").mkdir(parents=True)
    said = commit.tidy(DISK, tmp_path)
    assert names_in(tmp_path) == {"whole", "marked", "notes-unfinished", "plots-replaced", "foreign"}
    assert any("half was never finished" in line for line in said)
    assert any("marked is complete" in line for line in said)


def test_tidying_a_clean_directory_does_nothing(tmp_path):
    save(tmp_path / "a", 1)
    assert commit.tidy(FailingDisk(0, forever=True), tmp_path) == []
    assert commit.tidy(DISK, tmp_path / "not there") == []


def test_tidying_puts_back_what_was_being_replaced(tmp_path):
    save(tmp_path / "a", 1)
    commit.begin(DISK, tmp_path / "a")
    said = commit.tidy(DISK, tmp_path)
    assert any("its earlier state is back" in line for line in said)
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 1


def test_tidying_finishes_a_replacement_that_was_published(tmp_path):
    save(tmp_path / "a", 2)
    save(tmp_path / "a-replaced", 1)
    commit.tidy(DISK, tmp_path)
    assert names_in(tmp_path) == {"a"}
    assert step_in(tmp_path / "a") == 2


def test_tidying_finishes_the_removal_of_what_was_replaced(tmp_path):
    save(tmp_path / "a", 2)
    (tmp_path / "a-replaced" / "weights").mkdir(parents=True)
    (tmp_path / "a-replaced-unfinished").touch()
    commit.tidy(DISK, tmp_path)
    assert names_in(tmp_path) == {"a"}


def test_tidying_removes_nemos_unfinished_file(tmp_path):
    """NeMo marks ``X.ckpt`` with ``X-unfinished``; without the marker it would look complete."""
    (tmp_path / "a.ckpt").write_bytes(b"half of it")
    (tmp_path / "a-unfinished").touch()
    commit.tidy(DISK, tmp_path)
    assert names_in(tmp_path) == set()


def test_a_foreign_link_is_neither_followed_nor_removed(tmp_path):
    save(tmp_path / "elsewhere" / "a", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "b").symlink_to(tmp_path / "elsewhere" / "a")
    commit.tidy(DISK, tmp_path / "run")
    assert step_in(tmp_path / "run" / "b") == 1
    save(tmp_path / "run" / "b", 2)
    assert step_in(tmp_path / "elsewhere" / "a") == 1


@pytest.mark.parametrize("kind", ["directory", "file", "set aside"])
def test_what_is_no_checkpoint_is_not_replaced_by_one(tmp_path, kind):
    """Somebody's sources, in a directory that is called like a checkpoint."""
    if kind == "file":
        (tmp_path / "a").write_text("theirs")
    else:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "net.py").write_text("theirs")
    if kind == "set aside":
        (tmp_path / "a-replaced").mkdir()
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    with pytest.raises(SaveFailedError, match=r"is no checkpoint.*change filename.*/a'"):
        save(tmp_path / "a", 1)
    with pytest.raises(OSError, match="is no checkpoint"):
        commit.point(DISK, tmp_path / "b", tmp_path / "a")
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == before
    save(tmp_path / "b", 2)
    with pytest.raises(OSError, match="is no checkpoint"):
        commit.duplicate(DISK, tmp_path / "b", tmp_path / "a", read(tmp_path / "b"))
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} >= before


def test_a_file_that_lightning_wrote_is_replaced(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"Lightning's")
    save(tmp_path / "a.ckpt", 1)
    assert names_in(tmp_path) == {"a.ckpt"}
    assert step_in(tmp_path / "a.ckpt") == 1


def test_a_text_that_is_called_like_a_marker_is_somebodys(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "page").write_text("theirs")
    (tmp_path / "notes-unfinished").write_text("a list of what is missing")
    assert commit.tidy(DISK, tmp_path) == []
    assert names_in(tmp_path) == {"notes", "notes-unfinished"}
    assert (tmp_path / "notes" / "page").exists()


def test_what_cannot_be_removed_keeps_no_run_from_starting(tmp_path):
    """Another user's, or a file that a network file system still has open."""

    class Stubborn(LocalDisk):
        def remove(self, path: Path) -> None:
            if path.name == "a":
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            super().remove(path)

    for name in ("a", "b"):
        save(tmp_path / name, 1)
        (tmp_path / name / "manifest.json").unlink()
        (tmp_path / f"{name}-unfinished").touch()
    save(tmp_path / "c", 3)
    said = commit.tidy(Stubborn(), tmp_path)
    assert any("a-unfinished is left over and could not be dealt with: " in line for line in said)
    assert names_in(tmp_path) == {"a", "a-unfinished", "c"}
    assert newest_step(tmp_path) == 3


class _IsRead(LocalDisk):
    """As NFS, while somebody on this host has a file of what was replaced open: its directory stays, with that file."""

    def remove(self, path):
        if path.name.endswith("-replaced") and path.is_dir():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        super().remove(path)


def test_who_reads_what_was_replaced_keeps_no_save_from_its_name(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path / "a", step, _IsRead())
        assert (step_in(tmp_path / "a"), complete_steps(tmp_path)) == (step, {step})
    commit.tidy(DISK, tmp_path)
    assert names_in(tmp_path) == {"a"}


def test_what_is_written_on_two_disks_is_not_published(tmp_path):
    """One is unmounted in the middle of a save: what is written from then on makes its directories anew, below the mount."""
    mount, checkpoint = tmp_path / "mount", tmp_path / "mount" / "a"
    commit.begin(DISK, checkpoint)
    DISK.write(checkpoint / "weights" / "file", [b"x"])
    mount.rename(tmp_path / "disk")
    DISK.make_directory(checkpoint / "context")
    with pytest.raises(FileNotFoundError, match="what was begun there is gone"):
        commit.publish(DISK, checkpoint, Manifest(1, 0))
    assert not commit.is_published(checkpoint)
