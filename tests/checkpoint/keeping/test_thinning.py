"""A checkpoint without its optimizer: all the rest as it was, and complete or absent at every moment."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.disks import FailingDisk
from helpers.engine import faults, lightning_state, names_in, newest_in, save, snapshot_of, step_in
from helpers.weights import places_of
from processes import python

from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.keeping.remover import Remover
from nemologger.checkpoint.keeping.retention import Kept
from nemologger.checkpoint.keeping.thinning import thin
from nemologger.checkpoint.manifest import Manifest, read
from nemologger.checkpoint.state.snapshot import EMA_STATE, OtherWeights, take
from nemologger.checkpoint.weights import described
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.errors import DamagedCheckpointError
from nemologger.ranks import SingleProcess

DISK = LocalDisk()
BOTH = pytest.mark.parametrize("apart", [True, False], ids=["files of their own", "mixed files"])


def files_in(checkpoint: Path) -> set[str]:
    return {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}


@BOTH
def test_all_but_the_optimizer_stays(tmp_path, apart):
    before = save(tmp_path / "a", 3, apart=apart, ranked=True, score=0.5, metrics={"loss": 0.5})
    thin(DISK, tmp_path / "a")
    after = read(tmp_path / "a")
    assert after.has_optimizer is False
    same = ("name", "step", "time", "life", "score", "ranked", "metrics", "owner", "world_size", "versions")
    assert [getattr(after, key) for key in same] == [getattr(before, key) for key in same]
    assert step_in(tmp_path / "a", thin=True) == 3
    assert faults(tmp_path / "a") == []
    assert names_in(tmp_path) == {"a"}
    assert set(described(tmp_path / "a" / "weights")) == {
        "state_dict.layer.weight", "state_dict.layer.bias", "state_dict.count",
    }  # fmt: skip
    assert files_in(tmp_path / "a") == {*after.files, "manifest.json"}
    assert (tmp_path / "a/context/io.json").read_bytes() == b'{"step": 3}'
    state = {"state_dict": {name: torch.empty_like(t) for name, t in lightning_state(3)["state_dict"].items()}}
    dcp.load(state, checkpoint_id=str(tmp_path / "a" / "weights"), no_dist=True)
    assert all(torch.equal(state["state_dict"][name], t) for name, t in lightning_state(3)["state_dict"].items())


def test_with_files_of_their_own_no_tensor_is_written_again(tmp_path):
    save(tmp_path / "a", 3, apart=True)
    shutil.copytree(tmp_path / "a", tmp_path / "before", copy_function=os.link)
    thin(DISK, tmp_path / "a")
    shared = {f for f in files_in(tmp_path / "a") if os.path.samefile(tmp_path / "a" / f, tmp_path / "before" / f)}
    assert shared == {"weights/__0_0.distcp", "weights/metadata.json", "context/io.json"}
    assert files_in(tmp_path / "before") - files_in(tmp_path / "a") == {"weights/__0_1.distcp"}


def big_state() -> dict:
    """Payloads of more than a page, on pages of their own, and averages beside the weights."""
    weights = {name: torch.randn(rows, 700) for name, rows in (("x", 3), ("y", 9), ("z", 5))}
    states = {i: {"exp_avg": w * 2, "exp_avg_sq": w * 3} for i, w in enumerate(weights.values())}
    return {
        "state_dict": weights,
        EMA_STATE: OtherWeights({name: w + 1 for name, w in weights.items()}),
        "optimizer_states": [{"state": states, "param_groups": []}],
        "lr_schedulers": [{"last_epoch": 3}],
        "callbacks": {"C": {"seen": 4}},
        "epoch": 2,
    }


@pytest.mark.parametrize("files", [1, 2, 5])
@BOTH
def test_large_tensors_and_averages(tmp_path, apart, files):
    state = big_state()
    saver = Saver(DISK, SingleProcess(), Planner(SingleProcess(), files, apart=apart))
    saver.save(take(state, None, [dict(enumerate("xyz"))]), tmp_path / "a", Manifest(step=1, epoch=0))
    assert apart <= (len(list((tmp_path / "a/weights").glob("*.distcp"))) == max(files, 2))
    size = sum(record.size for record in read(tmp_path / "a").files.values())
    thin(DISK, tmp_path / "a")
    assert faults(tmp_path / "a") == []
    one = sum(w.nbytes for w in state["state_dict"].values())  # there were four times that, and two stay
    assert 2 * one - 40_000 < size - sum(r.size for r in read(tmp_path / "a").files.values()) < 2 * one + 40_000
    # As they were placed before: read straight into memory, from the beginning of a page.
    placed = places_of(tmp_path / "a/weights", [f"state_dict.{name}" for name in "xyz"])
    assert {(p.header_start + len(p.header)) % 4096 for group in placed.values() for p in group} == {0}
    assert len(placed) == 3
    for directory, key in (("weights", "state_dict"), ("ema_weights", EMA_STATE)):
        loaded = {"state_dict": {name: torch.zeros_like(w) for name, w in state["state_dict"].items()}}
        dcp.load(loaded, checkpoint_id=str(tmp_path / "a" / directory), no_dist=True)
        assert all(torch.equal(loaded["state_dict"][name], w) for name, w in state[key].items()), directory
    common = torch.load(tmp_path / "a/weights/common.pt", weights_only=True)
    assert (common["callbacks"], common["epoch"]) == ({"C": {"seen": 4}}, 2)
    assert not {"optimizer_states", "lr_schedulers"} & set(common)
    assert common["nemologger"]["optimizer_names"] == []


def test_once_is_enough(tmp_path):
    save(tmp_path / "a", 1)
    thin(DISK, tmp_path / "a")
    thin(FailingDisk(0, forever=True), tmp_path / "a")
    assert step_in(tmp_path / "a", thin=True) == 1


def test_a_duplicate_keeps_its_own(tmp_path):
    manifest = save(tmp_path / "a", 1, apart=True)
    commit.duplicate(DISK, tmp_path / "a", tmp_path / "a-last", manifest)
    thin(DISK, tmp_path / "a")
    assert step_in(tmp_path / "a-last") == 1
    assert faults(tmp_path / "a-last") == faults(tmp_path / "a") == []


@pytest.mark.parametrize("file", ["weights/common.pt", "weights/.metadata", "weights/__0_0.distcp"])
def test_damage_does_not_become_part_of_it(tmp_path, file):
    """What is written again would have a checksum that fits."""
    saver = Saver(DISK, SingleProcess(), Planner(SingleProcess(), 1))
    saver.save(snapshot_of(1), tmp_path / "a", Manifest(step=1, epoch=0))
    content = bytearray((tmp_path / "a" / file).read_bytes())
    place = content.rindex(b"state_dict" if "distcp" not in file else b"data/0")
    content[place] ^= 1
    (tmp_path / "a" / file).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=Path(file).name):
        thin(DISK, tmp_path / "a")
    assert read(tmp_path / "a").has_optimizer
    assert any(Path(file).name in fault for fault in faults(tmp_path / "a"))
    assert names_in(tmp_path) == {"a"}


@pytest.mark.parametrize(
    ("forever", "apart"), [(False, True), (True, True), (False, False)], ids=["once", "for good", "mixed files"]
)
def test_a_disk_that_fails_at_any_call(tmp_path, forever, apart):
    save(tmp_path / "start" / "a", 1, apart=apart)
    save(tmp_path / "start" / "b", 2, apart=apart)
    at = 0
    while True:
        run = shutil.copytree(tmp_path / "start", tmp_path / str(at))
        disk = FailingDisk(at, forever=forever)
        try:
            thin(disk, run / "a")
        except OSError:
            assert disk.has_failed
        assert forever or "a" in names_in(run)
        whole = survey(run)
        assert {one.status for one in whole} <= {Status.COMPLETE, Status.UNFINISHED}
        assert {one.manifest.step for one in whole if one.manifest} == {1, 2}
        assert all(faults(one.path) == [] for one in whole if one.manifest)
        commit.tidy(DISK, run)
        assert names_in(run) == {"a", "b"}
        assert newest_in(run).manifest.step == 2
        assert step_in(run / "a", thin=not read(run / "a").has_optimizer) == 1
        thin(DISK, run / "a")
        assert step_in(run / "a", thin=True) == 1
        if not disk.has_failed:
            break
        at += 1
    assert at > 15


@pytest.mark.dist
def test_a_process_killed_at_any_call_leaves_a_complete_checkpoint(tmp_path):
    done = python(Path(__file__).parents[2] / "helpers" / "kill_thinner.py", tmp_path)
    assert int(done.stdout) > 15


def test_the_remover_warns_and_tries_again(tmp_path, caplog):
    save(tmp_path / "a", 1)
    disk = FailingDisk(0, only=("rename",))
    remover, kept = Remover(disk), Kept(str(tmp_path / "a"), 1, 1.0, None, ranked=True)
    with caplog.at_level(logging.WARNING):
        remover.thin(kept)
        remover.wait()
        assert "a keeps its optimizer state, which could not be removed: [Errno 28] No space left" in caplog.text
        assert step_in(tmp_path / "a") == 1
        assert names_in(tmp_path) == {"a"}
        caplog.clear()
        remover.thin(kept)
        remover.wait()
        assert step_in(tmp_path / "a", thin=True) == 1
        shutil.rmtree(tmp_path / "a")  # it is not looked at again
        remover.thin(kept)
        remover.wait()
    assert not caplog.text
