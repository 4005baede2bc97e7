"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.engine import faults, names_in, newest_in, save

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, inspect, newest, settled, survey
from nemologger.checkpoint.manifest import read
from nemologger.disk import LocalDisk
from nemologger.errors import CheckpointError, DamagedCheckpointError, UnfinishedCheckpointError

MEGATRON = Path(__file__).parents[1] / "fixtures" / "nemo2" / "megatron"


def nemos(directory: Path, name: str, mtime: float) -> Path:
    """A checkpoint as NeMo leaves it."""
    path = directory / name
    shutil.copytree(MEGATRON / "o1_sync", path / "weights")
    (path / "context").mkdir()
    os.utime(path, (mtime, mtime))
    return path


def unfinished(directory: Path, name: str, step: int) -> Path:
    """What is left of a save that died."""
    save(directory / name, step)
    (directory / name / "manifest.json").unlink()
    (directory / f"{name}-unfinished").touch()
    return directory / name


def statuses(directory: Path) -> dict[str, Status]:
    return {found.path.name: found.status for found in survey(directory)}


def test_nothing_there_is_none(tmp_path):
    assert newest_in(tmp_path) is None
    assert newest_in(tmp_path / "not even a directory") is None


def test_newest_is_by_step_whatever_the_clock_of_the_files_says(tmp_path):
    for step in (30, 4, 100):
        save(tmp_path / f"step={step}", step)
    os.utime(tmp_path / "step=4", (4e9, 4e9))
    assert newest_in(tmp_path).path.name == "step=100"


def test_of_one_step_the_later_is_the_newest(tmp_path):
    save(tmp_path / "b", 5)
    save(tmp_path / "a", 5)
    assert newest_in(tmp_path).path.name == "a"


def test_of_equals_the_last_is_taken_unless_it_points_to_the_other(tmp_path):
    save(tmp_path / "z", 5)
    commit.point(LocalDisk(), tmp_path / "z", tmp_path / "a-last")
    assert newest_in(tmp_path).path.name == "z"
    commit.duplicate(LocalDisk(), tmp_path / "z", tmp_path / "b-last", read(tmp_path / "z"))
    assert newest_in(tmp_path).path.name == "b-last"


def test_looking_changes_nothing(tmp_path):
    save(tmp_path / "a", 1)
    unfinished(tmp_path, "b", 2)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    newest_in(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_an_unfinished_newest_is_passed_over_loudly(tmp_path):
    save(tmp_path / "a", 1)
    unfinished(tmp_path, "b", 2)
    said: list[str] = []
    found = newest(survey(tmp_path), faults, said.append)
    assert found.path.name == "a"
    assert len(said) == 1
    assert str(tmp_path / "b") in said[0]
    assert "unfinished" in said[0]


def test_only_unfinished_ones_is_an_error_of_its_own(tmp_path):
    unfinished(tmp_path, "a", 1)
    (tmp_path / "b" / "weights").mkdir(parents=True)
    (tmp_path / "b-unfinished").touch()
    with pytest.raises(UnfinishedCheckpointError, match="only unfinished") as caught:
        newest_in(tmp_path)
    assert isinstance(caught.value, ValueError)
    assert "resume_from_path" in str(caught.value)


def test_only_damaged_ones_is_an_error_that_lists_them(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, 1)
        (tmp_path / name / "weights" / "common.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError) as caught:
        newest_in(tmp_path)
    assert all(name in str(caught.value) for name in ("a:", "b:", "weights/common.pt", "resume_from_path"))


def test_ours_without_its_manifest_is_damaged(tmp_path):
    save(tmp_path / "a", 1)
    (tmp_path / "a" / "manifest.json").unlink()
    found = inspect(tmp_path / "a")
    assert found.status is Status.DAMAGED
    assert "manifest.json" in found.why
    with pytest.raises(DamagedCheckpointError):
        newest_in(tmp_path)


@pytest.mark.parametrize("lost", [".metadata", "common.pt", "both"])
def test_ours_without_its_manifest_and_more_is_never_taken_for_a_whole_one(tmp_path, lost):
    """Such as what a removal leaves when the machine dies."""
    save(tmp_path / "a", 1)
    (tmp_path / "a" / "manifest.json").unlink()
    for file in ("common.pt", ".metadata") if lost == "both" else (lost,):
        (tmp_path / "a" / "weights" / file).unlink()
    assert inspect(tmp_path / "a").status is Status.DAMAGED


def test_a_whole_one_with_a_marker_left_over_is_complete(tmp_path):
    """The manifest was written, then the machine died before the marker went."""
    save(tmp_path / "a", 1)
    (tmp_path / "a-unfinished").touch()
    assert newest_in(tmp_path).path.name == "a"


def test_a_link_to_nowhere_is_passed_over(tmp_path):
    save(tmp_path / "a", 1)
    (tmp_path / "b-last").symlink_to("gone")
    assert statuses(tmp_path) == {"a": Status.COMPLETE, "b-last": Status.DAMAGED}
    assert newest_in(tmp_path).path.name == "a"
    assert "gone" in inspect(tmp_path / "b-last").why


def test_what_cannot_be_used_is_passed_over_with_the_reason(tmp_path):
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    said: list[str] = []
    found = newest(survey(tmp_path), faults, said.append, lambda one: "no optimizer" if one.path.name == "b" else None)
    assert found.path.name == "a"
    assert "no optimizer" in said[0]
    with pytest.raises(CheckpointError, match="too small") as caught:
        newest(survey(tmp_path), faults, said.append, lambda one: "too small")
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_files_beside_checkpoints_are_none(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "plots").mkdir()
    (tmp_path / ".hidden" / "weights").mkdir(parents=True)
    (tmp_path / "a-unfinished").touch()
    assert survey(tmp_path) == []


# --- NeMo's -----------------------------------------------------------------------------------------------------------


def test_nemos_are_complete_newest_by_mtime(tmp_path):
    nemos(tmp_path, "a", 3000)
    nemos(tmp_path, "b", 1000)
    assert statuses(tmp_path) == {"a": Status.FOREIGN, "b": Status.FOREIGN}
    assert newest_in(tmp_path).path.name == "a"


def test_of_nemos_the_last_is_looked_for_first(tmp_path):
    nemos(tmp_path, "a", 3000)
    nemos(tmp_path, "b-last", 1000)
    nemos(tmp_path, "c-last", 2000)
    assert newest_in(tmp_path).path.name == "c-last"


def test_nemos_with_its_marker_is_unfinished(tmp_path):
    nemos(tmp_path, "a", 1000)
    nemos(tmp_path, "b-last", 2000)
    (tmp_path / "b-last-unfinished").touch()
    assert newest_in(tmp_path).path.name == "a"
    (tmp_path / "a-unfinished").touch()
    with pytest.raises(UnfinishedCheckpointError):
        newest_in(tmp_path)


def test_ours_go_before_nemos(tmp_path):
    nemos(tmp_path, "theirs-last", 4e9)
    save(tmp_path / "ours", 1)
    assert newest_in(tmp_path).path.name == "ours"


def test_nemos_on_a_plain_lightning_strategy(tmp_path):
    """A file beside a directory that only holds the context; the file's marker has no ``.ckpt`` in its name."""
    (tmp_path / "a.ckpt").touch()
    (tmp_path / "a" / "context").mkdir(parents=True)
    (tmp_path / "removed" / "context").mkdir(parents=True)
    assert newest_in(tmp_path).path.name == "a.ckpt"
    (tmp_path / "a-unfinished").touch()
    assert statuses(tmp_path)["a.ckpt"] is Status.UNFINISHED


def test_lightnings_last_is_a_last(tmp_path):
    for name in ("last.ckpt", "epoch=1.ckpt", "x-last.ckpt"):
        (tmp_path / name).touch()
    assert {found.path.name: found.is_last for found in survey(tmp_path)} == {
        "last.ckpt": True,
        "epoch=1.ckpt": False,
        "x-last.ckpt": True,
    }


@pytest.mark.parametrize(("name", "end"), [("a-end", True), ("a-end.ckpt", True), ("a-ending", False), ("end", False)])
def test_the_end_of_a_run_is_told_by_the_name(tmp_path, name, end):
    (tmp_path / name / "weights").mkdir(parents=True)
    assert inspect(tmp_path / name).is_end is end


def test_a_replaced_one_is_found_until_its_successor_is_published(tmp_path):
    """The process died while it replaced a checkpoint by one of the same name."""
    save(tmp_path / "a", 1)
    commit.begin(LocalDisk(), tmp_path / "a")
    assert names_in(tmp_path) == {"a", "a-unfinished", "a" + names.REPLACED}
    chosen = newest_in(tmp_path).path
    assert read(chosen).step == 1
    assert settled(chosen) == chosen
    commit.tidy(LocalDisk(), tmp_path)  # the run that was going to load it starts
    assert settled(chosen) == tmp_path / "a"
    assert settled(tmp_path / "gone") == tmp_path / "gone"


def test_what_may_not_be_read_hides_nothing_else(monkeypatch):
    for method, answer in (("exists", os.path.exists), ("is_dir", os.path.isdir), ("is_symlink", os.path.islink)):
        monkeypatch.setattr(Path, method, lambda self, answer=answer: answer(self))  # as from Python 3.14 on
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        directory = Path(place)
        for step, name in enumerate(("a", "b", "lost+found"), start=1):
            save(directory / name, step)
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755)  # whatever the umask
        (directory / "b").chmod(0)
        (directory / "lost+found").chmod(0)
        try:
            with suppress(PermissionError):  # only root may, who reads everything
                os.seteuid(65534)
            found = survey(directory)
        finally:
            os.seteuid(user)
        assert [(one.path.name, one.status) for one in found] == [("a", Status.COMPLETE), ("b", Status.DAMAGED)]
        assert found[1].why == "it cannot be read: Permission denied"
