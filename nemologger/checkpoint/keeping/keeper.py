"""Saves, and keeps what is to be kept: commit, then ``-last``, then what is surplus goes. On all ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nemologger.checkpoint import commit
from nemologger.checkpoint.keeping.decision import Decision
from nemologger.checkpoint.keeping.errand import Errand
from nemologger.checkpoint.keeping.last_link import LastLink
from nemologger.checkpoint.keeping.remover import Remover
from nemologger.checkpoint.keeping.retention import Policy
from nemologger.checkpoint.keeping.shelf import Shelf, prune, settle
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.checkpoint.writing.memory_disk import MemoryDisk
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.saver import Saver
from nemologger.checkpoint.writing.staging import StagingMode
from nemologger.checkpoint.writing.write import write_file
from nemologger.disk import Disk
from nemologger.disk.there import exists
from nemologger.errors import SaveFailedError
from nemologger.ranks import Ranks, decide
from nemologger.stores.client import before_training
from nemologger.stores.remote_disk import OverlappingDisk, RemoteDisk

log = logging.getLogger(__name__)

ContextWriter = Callable[[Path, Disk], None]


@dataclass(frozen=True)
class _Pending:
    decision: Decision
    protected: frozenset[str]
    published: Manifest | None = None


class Keeper:
    """The checkpoints of one callback.

    Args:
        disk: Where they are.
        ranks: The processes that write together.
        policy: What is to be kept.
        link: Whether ``-last`` is to be a symbolic link. Without renames or hard links it is one, where such links exist.
        shelf: What is kept now.
        files_per_rank: At most so many weights files for each rank.
        beside: Whether :meth:`start` is wanted: saving beside training.
        staging: When the state is copied then: ``"at_once"``, ``"overlapped"`` or ``"auto"``.
    """

    def __init__(
        self,
        disk: Disk,
        ranks: Ranks,
        policy: Policy,
        *,
        link: bool,
        shelf: Shelf,
        files_per_rank: int = 2,
        beside: bool = False,
        staging: StagingMode = "auto",
    ) -> None:
        self._shelf = shelf
        self._disk = disk
        self._ranks = ranks
        self._policy = policy
        self._last_link = LastLink(disk, wanted=link)
        self._lost: list[str] = []
        self._remover = Remover(disk)
        overlapping = OverlappingDisk(disk.store) if isinstance(disk, RemoteDisk) else disk
        planner = Planner(ranks, files_per_rank, apart=policy.states != -1)
        self._saver = Saver(overlapping, ranks, planner)
        self._beside = AsyncSaver(disk, ranks, planner, staging) if beside else None
        self._pending: _Pending | None = None
        self._settled: Shelf | None = None
        self._errand: Errand | None = None
        self._getting_ready: Errand | None = None

    @property
    def shelf(self) -> Shelf:
        """What is kept. While a save is under way rank 0 may know more than the others."""
        return self._settled or self._shelf

    @property
    def busy(self) -> bool:
        """Whether a save is under way beside training; the same on all ranks."""
        return self._pending is not None

    def can_finish_now(self) -> bool:
        """Whether :meth:`finish` need not wait: the save under way is settled, or some rank has lost its part. Collective.

        A rank tells nobody of a part that it has lost before it is asked. Where nothing moves it is lost, too: else no save
        would be made any more.
        """
        beside = self._beside
        if beside is None or self._pending is None:
            return True

        def answer(states: list[tuple[bool, bool, bool]]) -> bool:
            is_settled = states[0][0]
            return is_settled or (all(over for _, over, _ in states) and any(failed for _, _, failed in states))

        stalled = beside.stalled
        return self._ranks.exchange(
            (self._settled is not None, beside.over or stalled, beside.failed or stalled), answer
        )

    def get_ready(self, lock: Callable[[], None], seconds: float | None = None) -> bool:
        """Before it is chosen what to keep: whether the disk answers. On rank 0, with nothing under way.

        Where it has not answered within ``seconds`` it is waited for beside training, and no save begins before it has.

        Args:
            lock: Looks after the lock of the directory.
            seconds: How long it may take; None is as long as it takes.
        """
        errand = self._getting_ready
        # What is still under way has had its time, and what it says is of an earlier moment.
        if errand is not None and not self._is_over(errand, None if seconds is None else 0.0):
            return False
        what = "its disk to answer, or what is surplus there to be removed"
        errand = self._getting_ready = Errand(partial(self._look_again, lock), what)
        errand.poll()
        return self._is_over(errand, seconds)

    def _is_over(self, errand: Errand, seconds: float | None) -> bool:
        try:
            is_over = errand.wait(seconds)
        except Exception:
            self._getting_ready = None
            raise
        if is_over:
            self._getting_ready = None
        return is_over

    def _look_again(self, lock: Callable[[], None]) -> bool:
        self._remover.wait()
        self._abandon_lost()
        self._drop_what_is_gone()
        lock()
        return True

    def _drop_what_is_gone(self) -> None:
        """What is gone (its disk is no longer mounted, say) keeps nothing else out."""
        kept = sorted(self._shelf.kept, key=lambda kept: kept.order)
        with contextlib.suppress(OSError):  # then nothing is known, and the save will tell
            if not kept or not self._disk.can_rename or exists(self._disk.path(kept[-1].path)):
                return
            self._disk.make_directory(self._disk.path(kept[-1].path).parent)  # an error if it was unmounted
            there = tuple(one for one in kept if exists(self._disk.path(one.path)))
            log.warning(
                "%s is gone, and so are %d of the %d checkpoints that were kept there. Were they moved, or is a disk no "
                "longer mounted? Saves go on.",
                kept[-1].path,
                len(kept) - len(there),
                len(kept),
            )
            last = self._shelf.last if self._shelf.last and exists(self._disk.path(self._shelf.last)) else ""
            self._shelf = replace(self._shelf, kept=there, last=last)

    def prune(self, protected: Callable[[], set[str]]) -> None:
        """Remove what is surplus, before anything is saved. Collective.

        Args:
            protected: Gives, on rank 0, the paths that must stay.
        """
        self._shelf = decide(self._ranks, lambda: self._prune(protected))

    def save(
        self,
        snapshot: Snapshot,
        decision: Decision,
        manifest: Manifest,
        write_context: ContextWriter | None,
        protected: set[str],
    ) -> None:
        """Save and wait until it is durable. Collective.

        Args:
            snapshot: The state.
            decision: Where it goes.
            manifest: What is to be said of it.
            write_context: Called on rank 0 with the directory for ``context/`` and a disk.
            protected: Paths that somebody else keeps.

        Raises:
            SaveFailedError: On every rank, if any of them failed.
        """
        self.finish()
        self._make_room()
        context = None if write_context is None else partial(self._write_context, write_context)
        with self._noting_loss(decision):
            published = self._saver.save(snapshot, self._disk.path(decision.path), manifest, context)
        self._take(decide(self._ranks, lambda: self._settle(decision, published, protected)))

    def _write_context(self, write: ContextWriter, output: Path) -> dict[str, FileRecord] | None:
        if not isinstance(self._disk, RemoteDisk):
            write(output, self._disk)
            return None
        memory = MemoryDisk()  # what is written for a disk costs a store a dozen requests
        write(output, memory)
        disk = OverlappingDisk(self._disk.store)
        records = {
            path.relative_to(output.parent).as_posix(): write_file(disk, path, iter([content]))
            for path, content in memory.files.items()
        }
        disk.sync(output)
        return records

    def prepare(self, snapshot: Snapshot) -> None:
        """Make ready to save beside training. Collective.

        Raises:
            SaveFailedError: If that is not possible here.
        """
        if self._beside is not None:
            self._beside.prepare(snapshot)

    def start(
        self,
        snapshot: Snapshot,
        decision: Decision,
        manifest: Manifest,
        write_context: ContextWriter | None,
        protected: set[str],
    ) -> None:
        """As :meth:`save`, but return as soon as the state is copied. Collective; :meth:`finish` first."""
        if self._beside is None:
            self.save(snapshot, decision, manifest, write_context, protected)
            return
        self._make_room()
        with self._noting_loss(decision):
            self._beside.start(snapshot, self._disk.path(decision.path), manifest, write_context)
        self._pending = pending = _Pending(decision, frozenset(protected))
        # To publish takes a dozen answers of the disk, or of a store, and more with many ranks: training waits for none.
        if self._ranks.rank == 0 or not self._disk.can_rename:
            self._errand = Errand(partial(self._look, self._beside, pending), f"{decision.path} to be published")

    def hold(self) -> None:
        """Before something that may change the state, other than an optimizer: wait until it is copied."""
        if self._beside is not None:
            self._beside.hold()

    def poll(self) -> bool:
        """Look after the save under way, without waiting. Whether this rank has just published it.

        Raises:
            SaveFailedError: If there is one rank, and it failed.
        """
        if self._beside is None or self._pending is None:
            return False
        try:
            with self._noting_loss(self._pending.decision):
                if self._errand is None:
                    settled = self._look(self._beside, self._pending)
                else:
                    settled = self._beside.hand_over() and self._errand.poll()
        except SaveFailedError:
            self._pending = self._settled = None
            raise
        if not settled:
            return False
        if self._ranks.world_size == 1:
            self.finish()
        return True

    def _look(self, beside: AsyncSaver, pending: _Pending) -> bool:
        """Publish and settle the save under way, if that can be done now. No other rank is asked."""
        published = beside.poll()
        if published is not None:
            self._settled = self._settle(pending.decision, published, set(pending.protected))
        return published is not None

    def finish(self) -> bool:
        """Wait for the save under way. Collective. Whether there was one, and it was not settled before.

        Raises:
            SaveFailedError: On every rank, if any of them failed.
        """
        if self._beside is None or self._pending is None:
            return False
        # It stays what is under way until its outcome is known: after Ctrl-C, finish_alone() looks after it.
        pending = self._pending
        try:
            with self._noting_loss(pending.decision):
                just_settled = self._errand is not None and self._errand.wait()
                settled = self._settled
                published = self._beside.finish()
        except SaveFailedError:
            self._pending = self._settled = None
            raise
        if published is None:
            self._pending = None
            return False
        self._pending = replace(pending, published=published)
        shelf = decide(
            self._ranks,
            lambda: settled or self._settle(pending.decision, published, set(pending.protected)),
        )
        self._pending = self._settled = None
        self._take(shelf)
        return settled is None or just_settled

    def finish_alone(self, *, others_are_there: bool) -> None:
        """Wait for the save under way without the other ranks, which may be gone if not ``others_are_there``."""
        if self._beside is None or self._pending is None:
            return
        pending, self._pending = self._pending, None
        if self._errand is not None:
            with contextlib.suppress(SaveFailedError):
                self._errand.wait()
        published = pending.published or self._beside.finish_alone(others_are_there=others_are_there)
        settled, self._settled = self._settled, None
        if settled is None and published is not None and self._ranks.rank == 0:
            settled = self._settle(pending.decision, published, set(pending.protected))
        self._shelf = settled or self._shelf

    def give_up(self) -> None:
        """Wait no longer for a save under way. It is lost, and what was published before stays the newest."""
        self._errand = self._getting_ready = self._pending = self._settled = None
        if self._beside is not None:
            self._beside.give_up()

    def finish_removals(self) -> None:
        """Wait until nothing changes on disk any more, other than by a save."""
        if self._getting_ready is not None:
            with contextlib.suppress(Exception):  # whoever saves next asks anew
                self._getting_ready.wait()
            self._getting_ready = None
        self._remover.wait()

    def close(self) -> None:
        """Give back memory and processes."""
        if self._errand is not None:
            with contextlib.suppress(SaveFailedError):
                self._errand.wait()
            self._errand = None
        self.finish_removals()
        if self._beside is not None:
            self._beside.close()

    def _prune(self, protected: Callable[[], set[str]]) -> Shelf:
        with before_training("What is surplus there"):
            shelf = prune(self._disk, self._remover.remove, self._shelf, self._policy, protected=protected())
        self._remover.wait()
        return shelf

    def _settle(self, decision: Decision, published: Manifest, protected: set[str]) -> Shelf:
        shelf = settle(
            self._disk,
            self._remover.remove,
            self._shelf,
            self._policy,
            decision,
            published,
            link=self._last_link.is_symbolic(decision),
            protected=protected,
        )
        lost, self._lost = self._lost, []
        for path in lost:  # the disk is there again
            self._remover.abandon(self._disk.path(path))
        if shelf.failed and self._disk.can_rename:
            self._last_link.ask_again()
            self._lost = [decision.last] if decision.last else []
        for kept in self._policy.thinned(shelf.kept):
            if kept.path not in protected and not shelf.failed:
                self._remover.thin(kept)
        return shelf

    @contextlib.contextmanager
    def _noting_loss(self, decision: Decision) -> Iterator[None]:
        """What a failed save has written is removed beside training, or, if the disk is away, with the next one."""
        try:
            yield
        except SaveFailedError:
            if self._ranks.rank == 0:
                self._lost.append(decision.path)
                self._remover.abandon(self._disk.path(decision.path))
            raise

    def _make_room(self) -> None:
        """What is being removed goes before something is saved: its name, or its space, may be wanted again."""
        self.finish_removals()
        self._abandon_lost()

    def _abandon_lost(self) -> None:
        for path in self._lost:
            with contextlib.suppress(OSError):  # the disk is still away
                commit.abandon(self._disk, self._disk.path(path))

    def _take(self, shelf: Shelf) -> None:
        self._shelf = shelf
        if shelf.failed:
            raise SaveFailedError(shelf.failed)
