"""Runs the stages of a save beside training: training waits for the copy into the arena, nothing else.

The copy is made at once, or while training goes on until the optimizer's next step (:mod:`.staging`).

Every rank has an arena and a writer process. :meth:`AsyncSaver.start` and :meth:`AsyncSaver.finish` are collective; between
them :meth:`AsyncSaver.poll` looks, without waiting for anybody, whether the files are written. A writer whose files are
says so in a small file beside them; rank 0 publishes when all have.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.writing import in_flight
from nemologger.checkpoint.writing.directories import common_files
from nemologger.checkpoint.writing.ending import abandon, not_saved, publish
from nemologger.checkpoint.writing.equipment import Equipment, Layout
from nemologger.checkpoint.writing.in_flight import InFlight
from nemologger.checkpoint.writing.memory_disk import MemoryDisk
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.progress import Progress, wait_aloud
from nemologger.checkpoint.writing.reports import merged, report_of
from nemologger.checkpoint.writing.staging import StagingMode
from nemologger.checkpoint.writing.writer_main import Job
from nemologger.disk import Disk
from nemologger.disk.there import exists
from nemologger.errors import SaveFailedError, SilentRankError
from nemologger.ranks import Ranks, decide, together_at_zero
from nemologger.stores.path import in_store

log = logging.getLogger(__name__)


class AsyncSaver:
    """Writes checkpoints beside training, one at a time.

    Args:
        disk: For what rank 0 does itself: markers, links, the manifest. The writer processes use the local file system.
        ranks: The processes that write together.
        planner: Says what each rank writes; default a new one.
        staging: ``"at_once"`` copies the state while training waits, ``"overlapped"`` until the optimizer's next step;
            ``"auto"`` overlaps if there are tensors on a CUDA device.
    """

    def __init__(
        self,
        disk: Disk,
        ranks: Ranks,
        planner: Planner | None = None,
        staging: StagingMode = "auto",
    ) -> None:
        self._disk = disk
        self._ranks = ranks
        self._equipment = Equipment(planner or Planner(ranks), ranks, staging)
        self._in_flight: InFlight | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way, or its outcome not yet known to all."""
        return self._in_flight is not None

    @property
    def over(self) -> bool:
        """Whether this rank's part of the save under way is written, or lost."""
        save = self._in_flight
        return save is None or save.over

    @property
    def failed(self) -> bool:
        """Whether it is lost. The others are told by :meth:`finish`."""
        return self._in_flight is not None and bool(self._in_flight.error)

    @property
    def stalled(self) -> bool:
        """Whether nothing has moved of this rank's part for so long that :meth:`finish` gives it up."""
        save = self._in_flight
        return save is not None and save.stalled

    def prepare(self, snapshot: Snapshot) -> Layout:
        """Make memory and writer for saves of this shape, where they are not there. Collective.

        Raises:
            SaveFailedError: If that failed on any rank.
        """
        return self._equipment.prepare(snapshot)

    def start(
        self,
        snapshot: Snapshot,
        checkpoint: Path,
        manifest: Manifest,
        write_context: Callable[[Path, Disk], None] | None = None,
    ) -> None:
        """Copy the state of this moment, and let it be written. Collective; the save before it is finished.

        Args:
            snapshot: What to save; the same keys and shapes on every rank.
            checkpoint: The directory.
            manifest: Step, metrics and so on; files and versions are filled in later.
            write_context: Called on rank 0 with the directory for ``context/`` and a disk to write it to.

        Raises:
            SaveFailedError: On every rank, if any of them failed. What was there before is untouched.
        """
        layout = self.prepare(snapshot)
        try:
            images = tuple((i.name, i.offset, i.size) for i in layout.arena.images)
            complete = replace(manifest, name=checkpoint.name, has_optimizer=snapshot.has_optimizer)
            remote = in_store(checkpoint)
            report = str(report_of(checkpoint, self._ranks.rank)) if self._ranks.rank else ""

            def stage() -> None:
                small = _small_files(snapshot, checkpoint, write_context) if self._ranks.rank == 0 else {}
                job = Job(str(checkpoint), images, small, remote.store if remote else None, report)
                self._in_flight = InFlight(checkpoint, complete, job, self._equipment)
                self._in_flight.stage(snapshot, layout)

            def begin_and_stage() -> None:
                if self._ranks.rank != 0:
                    stage()
                    return
                with ThreadPoolExecutor(1, thread_name_prefix="nemologger-begin") as beside:  # the disk takes its time
                    begun = beside.submit(commit.begin, self._disk, checkpoint, snapshot.directories)
                    stage()
                    wait_aloud(lambda seconds: bool(wait([begun], seconds).done), f"{checkpoint.parent} to answer")
                    begun.result()

            together_at_zero(self._ranks, begin_and_stage)
            # Not before the directory is marked as unfinished: writers make nothing that a next run would not remove.
            if self._in_flight is not None and self._in_flight.staging is None:
                self._in_flight.submit()
        except BaseException as error:
            if self._in_flight is not None:  # another rank has failed, and the devices of this one go on
                self._in_flight.drop_staging(in_flight.PATIENCE)
            self._in_flight = None
            if layout.writer.busy:
                layout.writer.kill()  # the next save gets another one: it must not be told how this one ended
            abandon(self._disk, self._ranks, checkpoint)
            if not isinstance(error, Exception) or isinstance(error, SilentRankError):  # Ctrl-C; nobody to go on with
                raise
            raise not_saved(checkpoint, error) from error

    def hold(self) -> None:
        """Before something that may change the state: wait until it is copied. No collective."""
        save = self._in_flight
        if save is not None:
            save.hold()

    def hand_over(self) -> bool:
        """Give the writer what is copied; whether that is done. Never waits. Only in the thread that trains."""
        save = self._in_flight
        return save is None or save.hand_over()

    def poll(self) -> Manifest | None:
        """Look whether the save is done; on rank 0, publish it when all ranks' files are written.

        After :meth:`hand_over` another thread may do so, while nothing else is asked of the saver but :meth:`hold`.

        Returns:
            The manifest, once, on the rank that has just published it.

        Raises:
            SaveFailedError: If there is only one rank, and it failed. Several ranks are told by :meth:`finish`.
        """
        save = self._in_flight
        if save is None or save.published is not None or save.error or not save.hand_over():
            return None
        if not save.over:
            save.ask_writer(timeout=0.0)
        if not save.over:
            return None
        if save.error:
            if self._ranks.world_size == 1:
                self.finish()
            return None
        records = save.gathered or (save.all_records(self._ranks.world_size) if self._ranks.rank == 0 else None)
        if records is None:
            return None
        try:
            return self._publish(save, records)
        except OSError as error:
            save.error = f"{type(error).__name__}: {error}"
            if self._ranks.world_size == 1:
                self.finish()
            return None

    def finish(self) -> Manifest | None:
        """Wait for the save under way. Collective.

        Returns:
            Its manifest, on every rank; None if there was none.

        Raises:
            SaveFailedError: On every rank, if any of them failed. What was there before is untouched, and what there is of
                this one is for the caller to abandon: the disk may not answer.
        """
        save = self._in_flight
        if save is None:
            return None
        try:
            # What is published is saved, whatever has become of a writer since it said that its files are there.
            shares = [] if self._wait(save) else together_at_zero(self._ranks, lambda: save.records)
            published = decide(self._ranks, lambda: save.published or self._publish(save, merged(shares)))
        except SilentRankError:  # as after Ctrl-C, finish_alone() goes on
            raise
        except Exception as error:
            self._in_flight = None
            raise not_saved(save.checkpoint, error) from error
        self._in_flight = None
        return published

    def finish_alone(self, *, others_are_there: bool) -> Manifest | None:
        """As :meth:`finish` when the ranks may not agree any more: no collective, and a wait that ends if nothing moves.

        Args:
            others_are_there: They have no reason to have died. If they may have, their files are waited for only as long as
                they grow.

        Returns:
            The manifest, on rank 0 if it could be published.
        """
        save = self._in_flight
        if save is None:
            return None
        progress, pause = Progress(save, hint="; Ctrl-C gives it up"), 0.02
        while save.published is None and not save.error:
            with contextlib.suppress(SaveFailedError):
                published = self.poll()
                if published is not None or (self._ranks.rank != 0 and save.outcome is not None):
                    break
            patience = save.patience(others_are_there=others_are_there)
            progress.tell()
            if save.idle((save.size_on_disk, save.staging, save.outcome, self._equipment.heard)) > patience:
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.5)  # it may take minutes, and to look costs a shared file system something
        save.drop_staging(in_flight.QUIET)
        self._in_flight = None
        if self._ranks.rank == 0 and save.published is None:
            missing = [
                rank for rank in range(1, self._ranks.world_size) if not exists(report_of(save.checkpoint, rank))
            ]
            why = save.error or f"nothing more comes from {', '.join(f'rank {rank}' for rank in missing) or 'rank 0'}"
            log.error("checkpoint %s, which was being written, is lost: %s", save.checkpoint, why)
        return save.published

    def give_up(self) -> None:
        """End the writer process in the middle of what it does; say what is lost."""
        save = self._in_flight
        if save is not None and save.published is None:
            log.error(
                "checkpoint %s, which was being written, is lost; the one before it is still the newest",
                save.checkpoint,
            )
        self._equipment.kill_writer()
        self.close()
        self._in_flight = None

    def close(self) -> None:
        """Give back the memory, and end the writer process."""
        if self._in_flight is not None:
            self._in_flight.drop_staging(in_flight.QUIET)
        self._equipment.close()

    def _wait(self, save: InFlight) -> bool:
        """Wait until every rank's part is written, or lost, and say how far this one's is. Collective.

        The ranks wait in turns: a device or a storage that takes its time on one of them is no reason for the others to take
        it for dead, and one that has died is missed at once.

        Returns:
            Whether rank 0 has published it already.
        """
        progress: Progress | None = None
        while True:
            if not save.over:
                progress = progress or Progress(save)
                save.go_on()
                progress.tell(save.still)
                if save.stalled:
                    save.lose()
            mine = save.over, save.published is not None
            over, published = self._ranks.exchange(mine, lambda states: (all(s[0] for s in states), states[0][1]))
            if over:
                return published

    def _publish(self, save: InFlight, records: dict[str, FileRecord]) -> Manifest:
        save.gathered = records
        for rank in range(1, self._ranks.world_size):
            self._disk.remove(report_of(save.checkpoint, rank))
        save.published = publish(self._disk, self._ranks, save.checkpoint, save.manifest, records)
        return save.published


def _small_files(
    snapshot: Snapshot,
    checkpoint: Path,
    write_context: Callable[[Path, Disk], None] | None,
) -> dict[str, bytes]:
    """What rank 0 writes in this save besides what is the same in every one, by path below the checkpoint."""
    small = common_files(snapshot)
    if write_context is not None:
        memory = MemoryDisk()
        write_context(checkpoint / names.CONTEXT, memory)
        small.update({path.relative_to(checkpoint).as_posix(): data for path, data in memory.files.items()})
    return small
