"""What a callback finds of its own, and what it removes."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path

from helpers.engine import names_in, save

from nemologger.checkpoint import commit
from nemologger.checkpoint.keeping.decision import Decision
from nemologger.checkpoint.keeping.retention import Policy
from nemologger.checkpoint.keeping.shelf import look, prune, settle
from nemologger.disk import LocalDisk

OWNER = {"monitor": "loss", "mode": "min", "key": "every 5"}
DISK = LocalDisk()
REMOVE = partial(commit.retract, DISK)


def _save(directory, name, step, score, **more):
    return save(directory / name, step, owner=OWNER, score=score, ranked=True, **more)


def test_it_finds_its_own_whatever_the_interval_unless_another_callback_has_the_same_metric(tmp_path):
    _save(tmp_path, "a", 1, 0.5)
    save(tmp_path / "b", 2, owner={**OWNER, "monitor": "accuracy"})
    save(tmp_path / "c", 3, owner={**OWNER, "key": "every 9"}, score=0.1, ranked=True)
    assert {k.path[-1] for k in look(DISK, tmp_path, OWNER, alone=True).kept} == {"a", "c"}
    shelf = look(DISK, tmp_path, OWNER, alone=False)
    assert {k.path[-1] for k in shelf.kept} == {"a"}
    assert (shelf.life, shelf.newest_step) == (0, 3)


def test_a_copy_is_nobodys(tmp_path):
    _save(tmp_path, "a", 1, 0.5)
    shutil.copytree(tmp_path / "a", tmp_path / "mine")
    assert [k.path[-1] for k in look(DISK, tmp_path, OWNER, alone=True).kept] == ["a"]


def test_pruning_leaves_the_best_and_what_is_protected(tmp_path):
    for step, score in ((1, 0.5), (2, 0.1), (3, 0.9)):
        _save(tmp_path, f"s{step}", step, score)
    shelf = look(DISK, tmp_path, OWNER, alone=True)
    shelf = prune(DISK, REMOVE, shelf, Policy(1), protected={str(tmp_path / "s3")})
    assert names_in(tmp_path) == {"s2", "s3"}
    assert {k.step for k in shelf.kept} == {2, 3}


def test_settling_publishes_last_and_removes_the_one_before(tmp_path):
    shelf = look(DISK, tmp_path, OWNER, alone=True)
    for step, score in ((1, 0.5), (2, 0.1)):
        published = _save(tmp_path, f"s{step}", step, score)
        decision = Decision(str(tmp_path / f"s{step}"), str(tmp_path / f"s{step}-last"), score, ranked=True)
        shelf = settle(DISK, REMOVE, shelf, Policy(1), decision, published, link=False, protected=set())
        assert shelf.last == decision.last
        assert shelf.failed == ""
    assert names_in(tmp_path) == {"s2", "s2-last"}


def test_a_disk_that_fails_behind_the_new_last_costs_no_save(tmp_path, monkeypatch, caplog):
    """The checkpoint and its ``-last`` are there; only the link before them is not removed."""
    shelf, stat = look(DISK, tmp_path, OWNER, alone=True), Path.stat

    def fails(path, **options):
        if path.name == "s1-last":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **options)

    for step in (1, 2):
        published = _save(tmp_path, f"s{step}", step, 1 / step)
        decision = Decision(str(tmp_path / f"s{step}"), str(tmp_path / f"s{step}-last"), 1 / step, ranked=True)
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr(Path, "stat", fails)
            shelf = settle(DISK, REMOVE, shelf, Policy(1), decision, published, link=True, protected=set())
        assert (shelf.last, shelf.failed) == (decision.last, "")
    assert "s1-last, which has a successor, may be left over" in caplog.text
    assert names_in(tmp_path) == {"s1-last", "s2", "s2-last"}
