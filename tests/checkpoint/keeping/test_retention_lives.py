"""Whatever a run goes through, resuming, starting over, falling back and dying included: what is promised is there."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nemologger.checkpoint import commit
from nemologger.checkpoint.find import Status, survey
from nemologger.checkpoint.keeping.decision import choose
from nemologger.checkpoint.keeping.retention import Kept, Policy
from nemologger.checkpoint.keeping.shelf import Shelf, look, prune, settle
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.disk import LocalDisk

OWNER = {"monitor": "loss", "mode": "min", "key": "k"}


class _DiedError(BaseException):
    """The process is gone: nobody cleans up."""


class _Disk(LocalDisk):
    """Processes die here, machines do not."""

    def sync(self, directory):
        pass


class _MortalDisk(_Disk):
    """The process dies before its ``at``-th change of the disk; None is never."""

    def __init__(self, at: int | None) -> None:
        self.left = at

    def _live(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise _DiedError

    def make_directory(self, path):
        self._live()
        super().make_directory(path)

    def write(self, path, parts):
        self._live()
        super().write(path, parts)

    def link(self, source, target):
        self._live()
        super().link(source, target)

    def symlink(self, path, points_to):
        self._live()
        super().symlink(path, points_to)

    def rename(self, source, target):
        self._live()
        super().rename(source, target)

    def remove(self, path):
        self._live()
        super().remove(path)


@dataclass(frozen=True)
class Life:
    """How a life begins, what it saves, and before which change of the disk in its last save it dies.

    ``start`` is "resume" for the newest, "scratch", or the number of the checkpoint that it falls back to.
    """

    start: str | int
    scores: tuple[float, ...]
    dies: int | None


lives = st.lists(
    st.builds(
        Life,
        st.one_of(st.sampled_from(["resume", "scratch"]), st.integers(0, 3)),
        st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.nan]), min_size=1, max_size=4).map(tuple),
        st.none() | st.integers(0, 30),
    ),
    min_size=1,
    max_size=4,
)


def complete(directory: Path) -> dict[str, Manifest]:
    """What a reader finds, links left out."""
    found = [f for f in survey(directory) if f.status is Status.COMPLETE and not f.path.is_symlink()]
    return {f.path.name: f.manifest for f in found if f.manifest is not None}


def best(there: dict[str, Manifest], k: int, *, monitored: bool) -> set[str]:
    """The oracle: the names of the best k of those that compete."""

    def place(name: str) -> tuple[float, ...]:
        m = there[name]
        if not monitored:
            return (-m.life, -m.step, -m.time)
        assert m.score is not None
        return (-m.origin, math.isnan(m.score), 0.0 if math.isnan(m.score) else m.score, m.time)

    ranked = sorted((name for name, m in there.items() if m.ranked and not m.last), key=place)
    return set(ranked if k == -1 else ranked[:k])


class Run:
    """One directory, and what its callback does to it: what ModelCheckpoint does, without a model."""

    def __init__(self, directory: Path, policy: Policy, last: Any) -> None:
        self.directory, self.policy, self.last = directory, policy, last
        self.clock = 0.0

    def begin(self, start: str | int) -> tuple[Shelf, int]:
        disk = _Disk()
        shelf = look(disk, self.directory, OWNER, alone=True)
        there = sorted(complete(self.directory).items(), key=lambda item: item[1].order)
        resumed = None
        if there and start != "scratch":
            resumed = there[-1] if start == "resume" else there[int(start) % len(there)]
        protected = {str(self.directory / resumed[0])} if resumed else set()
        shelf = prune(disk, partial(commit.retract, disk), shelf, self.policy, protected=protected)
        assert resumed is None or resumed[0] in complete(self.directory)
        return shelf, resumed[1].step if resumed else 0

    def save(self, disk: LocalDisk, shelf: Shelf, line: tuple[int, int], step: int, score: float) -> Shelf:
        self.clock += 1.0
        life, origin = line
        known = score if self.policy.monitored else None
        path = str(self.directory / f"step={step}")
        candidate = Kept(path, step, self.clock, known, ranked=True, life=life, origin=origin)
        decision = choose(self.policy, shelf.kept, candidate, save_last=self.last)
        if decision is None:
            return shelf
        target = Path(decision.path)
        commit.begin(disk, target)
        disk.write(target / "weights" / "data", [b"x"])
        manifest = Manifest(
            step=step, epoch=0, name=target.name, life=life, origin=origin, time=self.clock, owner=OWNER,
            score=known, ranked=decision.ranked, last=decision.path == decision.last,
            files={"weights/data": FileRecord(1, ("00",))},
        )  # fmt: skip
        commit.publish(disk, target, manifest)
        return settle(
            disk, partial(commit.retract, disk), shelf, self.policy, decision, manifest, link=self.last == "link",
            protected=set(),
        )  # fmt: skip


def newest(there: dict[str, Manifest]) -> tuple[int, int]:
    return max(((m.life, m.step) for m in there.values()), default=(-1, -1))


def promised_after(before: dict[str, Manifest], run: Run, new: Manifest) -> set[str] | None:
    """The oracle: what is to be there after a save of ``new``; None if nothing is to be saved."""
    name, monitored, k = new.name, run.policy.monitored, run.policy.top_k
    rivals = {n: m for n, m in before.items() if not m.last and n != name}
    admitted = name in best({**rivals, name: new}, k, monitored=monitored)
    if not admitted and not run.last:
        return None
    after = {**rivals, name: new} if admitted else {n: m for n, m in before.items() if not m.last}
    stays = best(after, k, monitored=monitored)
    if run.last == "link":
        return stays | {name}
    return stays | ({f"{name}-last"} if run.last else set())


@settings(max_examples=50, deadline=None)
@given(lives, st.sampled_from([-1, 1, 2]), st.booleans(), st.sampled_from([True, "link", False]))
def test_what_is_promised_is_there_after_any_lives(sequence, k, monitored, last):
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(Path(temporary), Policy(k, monitored=monitored), last)
        for life in sequence:
            shelf, step = run.begin(life.start)
            line = shelf.line_from(step, 0)
            for i, score in enumerate(life.scores):
                step += 1
                before = complete(run.directory)
                new = Manifest(
                    step=step, epoch=0, name=f"step={step}", life=line[0], origin=line[1], time=run.clock + 1.0,
                    score=score if monitored else None, ranked=True,
                )  # fmt: skip
                promised = promised_after(before, run, new)
                dies = life.dies if i == len(life.scores) - 1 else None
                try:
                    shelf = run.save(_MortalDisk(dies), shelf, line, step, score)
                except _DiedError:
                    event("died")
                    assert promised is not None
                    look(_Disk(), run.directory, OWNER, alone=True)  # what the next life does first
                    there = complete(run.directory)
                    assert promised & before.keys() <= there.keys() <= promised | before.keys()
                    assert newest(there) in (newest(before), (new.life, new.step))
                    assert there or not before
                else:
                    there = complete(run.directory)
                    assert there.keys() == (before.keys() if promised is None else promised)
                    assert promised is None or newest(there) == (new.life, new.step)
                    assert {kept.path for kept in shelf.kept} == {str(run.directory / name) for name in there}


def test_what_the_next_line_is():
    shelf = Shelf(life=3, origin=2, newest_step=10)
    assert shelf.line_from(10, 40) == shelf.line_from(12, 0) == (3, 2)
    assert shelf.line_from(4, 16) == (4, 2)
    assert shelf.line_from(0, 0) == (4, 4)
    assert Shelf().line_from(0, 0) == (0, 0)
    counted = Shelf(life=3, origin=2, newest_step=10, newest_samples=40)
    assert counted.line_from(10, 0) == (3, 2)  # samples are not known of a checkpoint of Lightning
    uncounted = Shelf(life=3, origin=2, newest_step=0, newest_samples=40)
    assert uncounted.line_from(0, 40) == (3, 2)
    assert uncounted.line_from(0, 16) == (4, 2)
    assert uncounted.line_from(0, 0) == (4, 4)


@pytest.mark.parametrize("k", [1, 2])
def test_the_newest_line_outranks_the_higher_step(k):
    old = [Kept(f"step={step}", step, float(step), None, ranked=True) for step in (50, 100)]
    policy = Policy(k, monitored=False)
    back = Kept("step=60", 60, 200.0, None, ranked=True, life=1)
    assert policy.admits(back, old)
    assert back not in policy.surplus([*old, back], None)
    assert Policy(0, monitored=False).surplus([*old, back], None) == old
