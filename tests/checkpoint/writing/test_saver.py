"""A save, whole: what lies on disk, what it says of itself, and that a crash at any moment leaves a complete one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.crash import CrashModel, check_resumable, crashes, materialize
from helpers.disks import FailingDisk, RecordingDisk
from helpers.engine import faults, lightning_state, names_in, newest_in, save, snapshot_of, step_in

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint.keeping.thinning import thin
from nemologger.checkpoint.manifest import Manifest, read
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.saver import Saver
from nemologger.checkpoint.writing.write import write_share
from nemologger.disk import LocalDisk
from nemologger.errors import SaveFailedError
from nemologger.ranks import SingleProcess

HELPERS = Path(__file__).parents[2] / "helpers"


def test_the_layout(tmp_path):
    save(tmp_path / "run" / "checkpoints" / "step=3", 3)
    below = (tmp_path / "run").rglob("*")
    assert sorted(p.relative_to(tmp_path / "run").as_posix() for p in below if p.is_file()) == [
        f"checkpoints/step=3/{file}"
        for file in (
            "context/io.json",
            "manifest.json",
            "weights/.metadata",
            "weights/__0_0.distcp",
            "weights/__0_1.distcp",
            "weights/common.pt",
            "weights/metadata.json",
        )
    ]


def test_the_manifest_that_was_published_is_returned(tmp_path):
    told = Manifest(step=3, epoch=1, epochs_done=1, consumed_samples=24, metrics={"val_loss": 0.5}, score=0.5)
    published = Saver(LocalDisk(), SingleProcess()).save(snapshot_of(3), tmp_path / "a", told)
    assert published == read(tmp_path / "a")
    assert (published.step, published.epoch, published.consumed_samples, published.score) == (3, 1, 24, 0.5)
    assert published.world_size == 1
    assert published.has_optimizer
    assert set(published.versions) == {"nemologger", "torch", "lightning", "python"}
    assert "manifest.json" not in published.files


@pytest.mark.parametrize("files", [1, 2, 5])
def test_at_most_so_many_files_per_rank(tmp_path, files):
    saver = Saver(LocalDisk(), SingleProcess(), Planner(SingleProcess(), files))
    saver.save(snapshot_of(1), tmp_path / "a", Manifest(step=1, epoch=0))
    shards = list((tmp_path / "a" / "weights").glob("*.distcp"))
    assert len(shards) == min(files, len(snapshot_of(1).tensors))


def test_a_state_without_tensors(tmp_path):
    Saver(LocalDisk(), SingleProcess()).save(take({"epoch": 0}), tmp_path / "a", Manifest(step=0, epoch=0))
    assert newest_in(tmp_path).manifest.has_optimizer is False
    assert not list((tmp_path / "a" / "weights").glob("*.distcp"))


def test_without_a_context(tmp_path):
    Saver(LocalDisk(), SingleProcess()).save(snapshot_of(1), tmp_path / "a", Manifest(step=1, epoch=0))
    assert names_in(tmp_path / "a") == {"weights", "manifest.json"}


def test_files_that_others_write_into_the_context_are_in_the_manifest(tmp_path):
    def write_context(directory: Path) -> None:
        (directory / "deep").mkdir(parents=True)
        (directory / "deep" / ".hidden").write_bytes(b"x" * 1000)
        (directory / "empty").touch()

    saver = Saver(LocalDisk(), SingleProcess())
    published = saver.save(snapshot_of(1), tmp_path / "a", Manifest(step=1, epoch=0), write_context)
    assert {"context/deep/.hidden", "context/empty"} <= set(published.files)
    assert faults(tmp_path / "a") == []


def test_a_context_that_fails_fails_the_save(tmp_path):
    save(tmp_path / "a", 1)

    def write_context(directory: Path) -> None:
        directory.mkdir()
        raise ValueError("no such artifact")

    with pytest.raises(SaveFailedError, match="ValueError: no such artifact") as caught:
        Saver(LocalDisk(), SingleProcess()).save(
            snapshot_of(2), tmp_path / "b", Manifest(step=2, epoch=0), write_context
        )
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, ValueError)
    assert names_in(tmp_path) == {"a"}


class Keeping(LocalDisk):
    """Says that it has written, and keeps more or nothing."""

    def __init__(self, keeps: bytes | None) -> None:
        self.keeps = keeps

    def write(self, path, parts):
        super().write(path, parts)
        if path.suffix == ".distcp" and self.keeps is None:
            path.unlink()
        elif path.suffix == ".distcp":
            path.write_bytes(path.read_bytes() + self.keeps)


def test_a_disk_that_has_not_kept_what_was_written_is_told_apart_from_one_that_is_not_shared(tmp_path):
    save(tmp_path / "a", 1)
    with pytest.raises(SaveFailedError, match=r"rank 0 finds \d+ bytes in .*__0_0\.distcp, and rank 0 wrote \d+:"):
        save(tmp_path / "b", 2, Keeping(b"more"))
    with pytest.raises(SaveFailedError, match=r"rank 0 does not see .*__0_0\.distcp, which rank 0 wrote: "):
        save(tmp_path / "b", 2, Keeping(None))
    assert names_in(tmp_path) == {"a"}


def test_saving_changes_nothing_of_the_state(tmp_path):
    state = lightning_state(3)
    state["state_dict"]["layer.weight"].requires_grad_()
    taken = take(state)
    Saver(LocalDisk(), SingleProcess()).save(taken, tmp_path / "a", Manifest(step=3, epoch=0))
    wanted = lightning_state(3)
    assert all(torch.equal(state["state_dict"][key], wanted["state_dict"][key]) for key in wanted["state_dict"])
    assert state["state_dict"]["layer.weight"].requires_grad
    assert state["optimizer_states"][0]["param_groups"] == wanted["optimizer_states"][0]["param_groups"]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    """Comparable by their checksums; and no order depends on a hash."""
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    assert first.files == second.files


@pytest.mark.parametrize("method", ["make_directory", "write", "sync"])
def test_the_cause_is_in_the_error(tmp_path, method):
    save(tmp_path / "a", 1)
    with pytest.raises(SaveFailedError, match="No space left on device") as caught:
        save(tmp_path / "b", 2, FailingDisk(1, only=(method,)))
    assert str(tmp_path / "b") in str(caught.value)
    assert newest_in(tmp_path).manifest.step == 1


def test_what_fails_after_the_commit_is_a_warning(tmp_path, caplog):
    """The checkpoint counts; a marker that could not be removed does no harm here."""
    save(tmp_path / "a", 2, FailingDisk(1, only=("remove",)))
    assert "cleaning up beside it failed" in caplog.text
    assert newest_in(tmp_path).manifest.step == 2
    commit.tidy(LocalDisk(), tmp_path)
    assert names_in(tmp_path) == {"a"}


def test_training_goes_on_from_the_previous_when_the_disk_is_full_for_a_while(tmp_path):
    save(tmp_path / "step=1", 1)
    for step in (2, 3, 4):
        with pytest.raises(SaveFailedError):
            save(tmp_path / f"step={step}", step, FailingDisk(step, only=("write",), forever=True))
        assert names_in(tmp_path) == {"step=1"}
    save(tmp_path / "step=5", 5)
    assert names_in(tmp_path) == {"step=1", "step=5"}


# --- crashes ----------------------------------------------------------------------------------------------------------


def _record(run: Path) -> RecordingDisk:
    """A few saves as the callback makes them: top-1, ``-last`` of both kinds, a name used again, a removal."""
    disk = RecordingDisk()
    directory = run / "name" / "version" / "checkpoints"

    def saved(name: str, step: int) -> Manifest:
        manifest = save(directory / name, step, disk)
        disk.note(step)
        return manifest

    manifest = saved("a", 1)
    commit.duplicate(disk, directory / "a", directory / "a-last", manifest)
    manifest = saved("b", 2)
    commit.duplicate(disk, directory / "b", directory / "b-last", manifest)
    commit.retract(disk, directory / "a")
    commit.retract(disk, directory / "a-last")
    for name in ("b", "new"):  # saves that fail, and saves that die
        commit.begin(disk, directory / name)
        commit.abandon(disk, directory / name)
        commit.begin(disk, directory / name)
        commit.tidy(disk, directory)
        disk.note(2)
    saved("b", 3)  # the same name again
    commit.point(disk, directory / "b", directory / "b-last")  # a directory becomes a link
    saved("c", 4)
    commit.point(disk, directory / "c", directory / "b-last")
    commit.retract(disk, directory / "b")
    saved("d", 5)
    thin(disk, directory / "c")
    return disk


def test_a_crash_after_any_operation_leaves_a_complete_checkpoint(tmp_path):
    """Every prefix of what a run does on disk, with all, none, and random ones of the changes that were not synced."""
    run = tmp_path / "run"
    run.mkdir()
    operations = _record(run).operations
    count = published = 0
    for published, state, when in crashes(run, operations):
        count += 1
        materialize(state, tmp_path / f"crash{count}")
        check_resumable(tmp_path / f"crash{count}" / "name" / "version" / "checkpoints", published, when)
    assert count > 100
    assert published == 5


def test_what_is_said_to_be_saved_has_no_other_name_any_more(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    model, notes = CrashModel(run), 0
    for operation in _record(run).operations:
        if operation[0] == "note":
            notes += 1
            assert not [name for name in model.crash(lambda: False) if "-unfinished" in name]
        else:
            for _ in model.steps(operation):
                pass
    assert notes > 5


def test_whoever_sees_a_manifest_can_rely_on_all_it_lists(tmp_path):
    """Not only after a crash: a reader may look at any moment, and the machine may die right after."""
    run = tmp_path / "run"
    run.mkdir()
    operations = _record(run).operations
    model = CrashModel(run)
    manifests = 0
    for operation in operations:
        for _ in model.steps(operation) if operation[0] != "note" else ():
            visible, durable = model.crash(lambda: True), model.crash(lambda: False)
            for manifest in (name for name in visible if name.endswith("/manifest.json")):
                manifests += 1
                below = manifest[: -len("manifest.json")]
                listed = {below + file for file in Manifest.loads(visible[manifest], run).files}
                # What was set aside a moment ago, or put back, is durable under its other name.
                assert {name.replace("-replaced", "") for name in listed - set(durable)} <= {
                    name.replace("-replaced", "") for name in durable
                }, operation[:2]
    assert manifests > 50


def test_the_crash_model_agrees_with_the_disk(tmp_path):
    """With every change kept, the model is what is really there."""
    run = tmp_path / "run"
    run.mkdir()
    operations = _record(run).operations
    model = CrashModel(run)
    for operation in operations:
        if operation[0] != "note":
            for _ in model.steps(operation):
                pass
    materialize(model.crash(lambda: True), tmp_path / "model")
    real = {p.relative_to(run): p.is_symlink() or p.is_dir() or p.read_bytes() for p in run.rglob("*")}
    modelled = {
        p.relative_to(tmp_path / "model"): p.is_symlink() or p.is_dir() or p.read_bytes()
        for p in (tmp_path / "model").rglob("*")
    }
    assert real == modelled
    materialize(model.crash(lambda: False), tmp_path / "synced")
    assert {p.relative_to(tmp_path / "synced") for p in (tmp_path / "synced").rglob("*")} == set(real)


@pytest.mark.dist
def test_a_process_killed_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    """Real processes, SIGKILL, dozens of times in one directory, each life going on where the one before was killed."""
    done = subprocess.run(
        [sys.executable, str(HELPERS / "kill_saver.py"), str(tmp_path / "checkpoints"), "40"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills, steps = map(int, done.stdout.split())
    assert kills == 40
    assert steps > 40
    assert step_in(newest_in(tmp_path / "checkpoints").path) == steps


def test_ctrl_c_in_the_middle_leaves_what_was_there(tmp_path):
    class Interrupted(LocalDisk):
        def write(self, path, parts):
            if path.name == "common.pt":
                raise KeyboardInterrupt
            super().write(path, parts)

    save(tmp_path / "a", 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "b", 2, disk=Interrupted())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a"]


def test_a_rank_that_comes_late_writes_nothing_into_what_is_complete(tmp_path):
    """It stood still, and those that were started anew have made that checkpoint meanwhile."""
    (tmp_path / names.MANIFEST).touch()
    with pytest.raises(FileExistsError, match="it is complete already"):
        write_share(LocalDisk(), tmp_path, {"file": []}, lambda piece: torch.empty(0))
    assert names_in(tmp_path) == {names.MANIFEST}
