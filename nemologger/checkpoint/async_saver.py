"""Runs the stages of a save beside training: training waits for the copy into the arena, nothing else.

Every rank has an arena and a writer process. :meth:`AsyncSaver.start` and :meth:`AsyncSaver.finish` are collective; between
them :meth:`AsyncSaver.poll` looks, without waiting for anybody, whether the files are written. A rank whose files are says
so in a small file beside them; rank 0 publishes when all have.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.arena import Arena
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.memory_disk import MemoryDisk
from nemologger.checkpoint.shares import into_files, share_out
from nemologger.checkpoint.snapshot import Snapshot
from nemologger.checkpoint.weights import BACKEND, Entry, dump_common, entries, lay_out, metadata, shape_of
from nemologger.checkpoint.writer import Writer
from nemologger.checkpoint.writer_main import Job, Outcome
from nemologger.disk import Disk
from nemologger.errors import NemologgerError, SaveFailedError
from nemologger.ranks import Ranks, decide, together
from nemologger.store_path import in_store

log = logging.getLogger(__name__)

_REPORT = ".written-by-rank-{}"
_PATIENCE = 60.0


@dataclass
class _InFlight:
    """A save under way, seen from one rank."""

    checkpoint: Path
    manifest: Manifest
    outcome: Outcome | None = None
    error: str = ""
    published: Manifest | None = None


@dataclass(frozen=True)
class _Layout:
    """What does not change from save to save."""

    outline: str
    arena: Arena
    writer: Writer
    metadata: bytes


class AsyncSaver:
    """Writes checkpoints beside training, one at a time.

    Args:
        disk: For what rank 0 does itself: markers, links, the manifest. The writer processes use the local file system.
        ranks: The processes that write together.
        files_per_rank: At most so many ``.distcp`` files for each rank.
    """

    def __init__(self, disk: Disk, ranks: Ranks, files_per_rank: int = 2) -> None:
        self._disk = disk
        self._ranks = ranks
        self._files_per_rank = files_per_rank
        self._layout: _Layout | None = None
        self._in_flight: _InFlight | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way, or its outcome not yet known to all."""
        return self._in_flight is not None

    def prepare(self, snapshot: Snapshot) -> _Layout:
        """Make arena and writer for saves of this shape. Collective; nothing to do if they are there.

        Raises:
            SaveFailedError: If that failed on any rank.
        """
        outline = snapshot.outline
        layout = self._layout
        usable = layout is not None and layout.outline == outline
        if all(self._ranks.gather(usable)) and layout is not None:
            return layout
        self.close()
        pieces = share_out(
            {key: shape_of(tensor) for key, tensor in snapshot.tensors.items()},
            snapshot.rank_zero,
            self._ranks.world_size,
        )[self._ranks.rank]
        files = {
            names.shard(self._ranks.rank, i): lay_out(group, snapshot.tensors)
            for i, group in enumerate(into_files(pieces, self._files_per_rank))
        }
        stored = [entry for name, places in files.items() for entry in entries(name, places)]
        made: list[tuple[Arena, Writer]] = []

        def make() -> tuple[str, list[Entry]]:
            arena = Arena(files, snapshot.tensors)
            made.append((arena, Writer(arena)))
            return outline, stored

        try:
            shares = together(self._ranks, make)
            if any(other != outline for other, _ in shares):
                raise SaveFailedError("the ranks hold different tensors (names, shapes or dtypes)")
        except (OSError, NemologgerError) as error:
            for arena, writer in made:
                writer.close()
                arena.close()
            raise SaveFailedError(f"saving beside training could not be set up: {error}") from error
        described = metadata(snapshot.tensors, snapshot.paths, [entry for _, share in shares for entry in share])
        self._layout = _Layout(outline, *made[0], described)
        return self._layout

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
            decide(self._ranks, lambda: commit.begin(self._disk, checkpoint))
            small = self._small_files(snapshot, layout, checkpoint, write_context) if self._ranks.rank == 0 else {}
            images = tuple((f"{names.WEIGHTS}/{i.name}", i.offset, i.size) for i in layout.arena.images)

            def hand_over() -> None:
                layout.arena.stage(snapshot.tensors)
                remote = in_store(checkpoint)
                layout.writer.submit(Job(str(checkpoint), images, small, remote.store if remote else None))

            together(self._ranks, hand_over)
        except BaseException as error:
            self._abandon(checkpoint)
            if not layout.writer.alive:
                self.close()  # the next save gets another writer
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            raise _failed(checkpoint, error) from error
        complete = replace(manifest, name=checkpoint.name, has_optimizer=snapshot.has_optimizer)
        self._in_flight = _InFlight(checkpoint, complete)

    def poll(self) -> Manifest | None:
        """Look whether the save is done; on rank 0, publish it when all ranks' files are written.

        Returns:
            The manifest, once, on the rank that has just published it.

        Raises:
            SaveFailedError: If there is only one rank, and it failed. Several ranks are told by :meth:`finish`.
        """
        save = self._in_flight
        if save is None or save.published is not None or save.error:
            return None
        if save.outcome is None and not self._take_outcome(save, timeout=0.0):
            return None
        if save.error:
            if self._ranks.world_size == 1:
                self.finish()
            return None
        records = self._all_records(save) if self._ranks.rank == 0 else None
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
            SaveFailedError: On every rank, if any of them failed. What was there before is untouched.
        """
        save = self._in_flight
        if save is None:
            return None
        if save.outcome is None and not save.error:
            log.info("waiting for checkpoint %s to be written", save.checkpoint)
            self._take_outcome(save, timeout=None)
        self._in_flight = None
        try:
            shares = together(self._ranks, lambda: _records_of(save))
            return decide(self._ranks, lambda: save.published or self._publish(save, _merged(shares)))
        except Exception as error:
            self._abandon(save.checkpoint)
            raise _failed(save.checkpoint, error) from error

    def finish_alone(self) -> Manifest | None:
        """As :meth:`finish` when the other ranks may be gone: no collective, and a limited wait for their files.

        Returns:
            The manifest, on rank 0 if it could be published.
        """
        save = self._in_flight
        end = time.monotonic() + _PATIENCE
        while save is not None and save.published is None and not save.error and time.monotonic() < end:
            with contextlib.suppress(SaveFailedError):
                published = self.poll()
                if published is not None or (self._ranks.rank != 0 and save.outcome is not None):
                    break
            time.sleep(0.02)
        self._in_flight = None
        return None if save is None else save.published

    def close(self) -> None:
        """Give back the memory, and end the writer process."""
        layout, self._layout = self._layout, None
        if layout is not None:
            layout.writer.close()
            layout.arena.close()

    def _small_files(
        self,
        snapshot: Snapshot,
        layout: _Layout,
        checkpoint: Path,
        write_context: Callable[[Path, Disk], None] | None,
    ) -> dict[str, bytes]:
        """What rank 0 writes besides tensors, by path below the checkpoint."""
        common = {
            **snapshot.common,
            OURS: {"format": manifests.FORMAT, "optimizer_names": snapshot.optimizer_names},
        }
        small = {
            f"{names.WEIGHTS}/{names.COMMON}": dump_common(common),
            f"{names.WEIGHTS}/{names.BACKEND}": BACKEND,
            f"{names.WEIGHTS}/{names.DCP_METADATA}": layout.metadata,
        }
        if write_context is not None:
            memory = MemoryDisk()
            write_context(checkpoint / names.CONTEXT, memory)
            small.update({path.relative_to(checkpoint).as_posix(): data for path, data in memory.files.items()})
        return small

    def _take_outcome(self, save: _InFlight, timeout: float | None) -> bool:
        """Ask the writer; whether the save has come to an end on this rank."""
        try:
            outcome = self._layout.writer.outcome(timeout) if self._layout is not None else None
        except SaveFailedError as error:
            save.error = str(error)
            self.close()  # the next save gets another writer
            return True
        if outcome is None:
            return False
        save.outcome, save.error = outcome, outcome.error
        if outcome.error:
            log.debug("%s", outcome.details)
        elif self._ranks.world_size > 1:
            report = {name: asdict(record) for name, record in outcome.records.items()}
            with contextlib.suppress(OSError):  # finish() gathers it all the same
                self._disk.write(self._report(save, self._ranks.rank), [json.dumps(report).encode()])
        return True

    def _all_records(self, save: _InFlight) -> dict[str, FileRecord] | None:
        """The files of all ranks, as soon as all have reported them."""
        records = dict(save.outcome.records) if save.outcome is not None else {}
        for rank in range(1, self._ranks.world_size):
            try:
                report = json.loads(self._report(save, rank).read_bytes())
            except OSError:  # it is not there yet, or a store does not answer: finish() gathers it all the same
                return None
            records.update({name: FileRecord(r["size"], tuple(r["blocks"])) for name, r in report.items()})
        return records

    def _report(self, save: _InFlight, rank: int) -> Path:
        return save.checkpoint / names.WEIGHTS / _REPORT.format(rank)

    def _publish(self, save: _InFlight, records: dict[str, FileRecord]) -> Manifest:
        for rank in range(self._ranks.world_size):
            self._disk.remove(self._report(save, rank))
        complete = replace(
            save.manifest,
            time=manifests.now(),
            world_size=self._ranks.world_size,
            files=records,
            versions=manifests.versions(),
        )
        commit.publish(self._disk, save.checkpoint, complete)
        save.published = complete
        return complete

    def _abandon(self, checkpoint: Path) -> None:
        if self._ranks.rank == 0:
            with contextlib.suppress(OSError):  # the disk that failed may fail again; the next run tidies up
                commit.abandon(self._disk, checkpoint)


def _records_of(save: _InFlight) -> dict[str, FileRecord]:
    if save.error or save.outcome is None:
        raise SaveFailedError(save.error or "the writer process did not answer")
    return save.outcome.records


def _merged(shares: list[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    return {name: record for share in shares for name, record in share.items()}


def _failed(checkpoint: Path, error: Exception) -> SaveFailedError:
    cause = str(error) if isinstance(error, NemologgerError) else f"{type(error).__name__}: {error}"
    return SaveFailedError(f"checkpoint {checkpoint} was not saved: {cause}")
