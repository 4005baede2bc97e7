"""A save that is under way beside training: one rank's part of it, from the copies to what its writer has written."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nemologger import names
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.writing.equipment import TURN, Equipment, Layout
from nemologger.checkpoint.writing.reports import loads, merged, report_of
from nemologger.checkpoint.writing.staging import Staging
from nemologger.checkpoint.writing.writer_main import Job, Outcome
from nemologger.errors import SaveFailedError
from nemologger.stores.path import in_store

log = logging.getLogger(__name__)

#: How long, in seconds, to wait for what does not move: a device, which may wait for a rank that has stopped; the files of
#: ranks that may be gone; and a storage that may answer yet.
PATIENCE = 60.0
QUIET = 5.0
STALLED = 600.0


class WriterError(Exception):
    """What was raised in the writer process: its traceback, as text, to be shown with the error that it leads to."""


@dataclass
class InFlight:
    """How far it is, and what takes it further. Asks no other rank.

    Attributes:
        checkpoint: The directory.
        manifest: What is said of it; files and versions are not known yet.
        job: What the writer process is to do.
        equipment: The memory to copy to, and that process.
        staging: The copies, until they are done and the job is handed to the writer.
        outcome: What the writer said, once it has.
        error: What went wrong, or "".
        details: The traceback of it, from the writer process, or "".
        gathered: The files of all ranks, on the rank that publishes, once it knows them.
        published: The manifest, on the rank that has published it.
        written: Bytes of this rank's large files that are there, or on their way to a store, as the writer has said last.
        reported: On rank 0, what the other ranks have reported, from rank 1 on.
    """

    checkpoint: Path
    manifest: Manifest
    job: Job
    equipment: Equipment
    staging: Staging | None = None
    outcome: Outcome | None = None
    error: str = ""
    details: str = ""
    gathered: dict[str, FileRecord] | None = None
    published: Manifest | None = None
    written: int = 0
    reported: list[dict[str, FileRecord]] = field(default_factory=list)
    _seen: object = None
    _moved: float = 0.0

    @property
    def over(self) -> bool:
        """Whether this rank's part is written, or lost."""
        return self.outcome is not None or bool(self.error)

    @property
    def still(self) -> float:
        """Seconds since something of it has moved, as far as this was asked."""
        return self.idle((self.written, self.staging, self.equipment.heard))

    @property
    def stalled(self) -> bool:
        """Whether nothing has moved of it for too long."""
        return not self.over and self.still > STALLED

    def stage(self, snapshot: Snapshot, layout: Layout) -> None:
        """Copy the state, or begin to."""
        layout.writer.stand_by()
        if not self.equipment.overlaps(snapshot):
            layout.arena.stage(layout.plan.reader(snapshot))
        else:
            staging = Staging(layout.arena.copies(layout.plan.reader(snapshot)), snapshot.may_change)
            self.staging = staging  # before it begins: what it has begun is to be waited for if it fails
            staging.begin()

    def hold(self) -> None:
        """Before something that may change the state: wait until it is copied."""
        staging = self.staging
        if staging is not None:
            staging.hold()

    def hand_over(self) -> bool:
        """Give the writer what is copied; whether that is done. Never waits. Only in the thread that trains."""
        if self.staging is not None and self.staging.done:
            self.submit()
        return self.staging is None

    def submit(self) -> None:
        """Hand the job to the writer, once all is copied. What goes wrong is in ``error``."""
        staging, self.staging = self.staging, None
        try:
            if staging is not None:
                staging.finish()
            if self.equipment.layout is not None:
                self.equipment.layout.writer.submit(self.job)
        except SaveFailedError as error:
            self.error = str(error)
            if self.equipment.has_writer:  # then it was the copies
                self.equipment.overlap_no_more()

    def go_on(self) -> None:
        """Wait for a turn, or until it is a stage further."""
        if self.staging is None:
            self.ask_writer(TURN)
        elif self.staging.wait(TURN):
            self.submit()

    def ask_writer(self, timeout: float) -> None:
        """Wait so many seconds for what the writer says of the job. If it has come to an end it is :attr:`over`."""
        layout = self.equipment.layout
        if layout is None:
            self.error = "the writer process was ended"
            return
        try:
            outcome = layout.writer.outcome(timeout)
        except SaveFailedError as error:
            self.error = str(error)  # the next save gets another writer
            return
        if outcome is None:
            self.written = min(layout.writer.sent, self.size)
            return
        self.outcome, self.error, self.details = outcome, outcome.error, outcome.details
        if outcome.error:
            log.debug("%s", outcome.details)

    def lose(self) -> None:
        """It has :attr:`stalled`, and is given up."""
        if self.staging is not None:
            self.drop_staging(0.0)
            self.error = f"the state was not copied within {STALLED:g} s: the device does not come to it"
        else:
            self.error = f"nothing was written for {STALLED:g} s: the storage does not answer"
            self.equipment.kill_writer()

    def drop_staging(self, patience: float) -> None:
        """Let the memory be: what was being copied will not be saved."""
        if self.staging is None:
            return
        staging, self.staging = self.staging, None
        self.error = "the run ended while the state was being copied"
        if not staging.give_up(patience) and self.equipment.layout is not None:
            self.equipment.layout.arena.leave()
            self.equipment.close()  # the next save, should there be one, gets memory that nobody writes to

    def patience(self, *, others_are_there: bool) -> float:
        """How long it may be, in seconds, until something moves. A store shows a file when all of it is there."""
        if self.staging is not None:
            return PATIENCE
        if self.outcome is None or others_are_there:
            return STALLED
        return PATIENCE if self.job.store is not None else QUIET

    @property
    def size(self) -> int:
        """Bytes of this rank's large files."""
        return sum(size for _, _, size in self.job.images)

    @property
    def size_on_disk(self) -> int:
        """Bytes of all ranks' large files that are there. A store shows a file when all of it is."""
        total = 0
        remote = in_store(self.checkpoint / names.WEIGHTS)
        if remote is not None:
            with contextlib.suppress(OSError):
                total = sum(remote.sizes().values())
            return total
        with contextlib.suppress(OSError), os.scandir(self.checkpoint / names.WEIGHTS) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # as above
                    total += entry.stat().st_size
        return total

    def idle(self, now_at: object) -> float:
        """Seconds since something has changed, as far as this was asked.

        Args:
            now_at: What changes as long as the save gets on.
        """
        now = time.monotonic()
        if now_at != self._seen:
            self._seen, self._moved = now_at, now
        return now - self._moved

    @property
    def records(self) -> dict[str, FileRecord]:
        """What this rank has written.

        Raises:
            SaveFailedError: If it could not.
        """
        if self.error or self.outcome is None:
            cause = WriterError(f"in the writer process:\n\n{self.details}") if self.details else None
            raise SaveFailedError(self.error or "the writer process did not answer") from cause
        return self.outcome.records

    def all_records(self, world_size: int) -> dict[str, FileRecord] | None:
        """On rank 0, the files of all ranks, as soon as all have reported them; each report is read once."""
        for rank in range(len(self.reported) + 1, world_size):
            try:
                report = report_of(self.checkpoint, rank).read_bytes()
            except OSError:  # it is not there yet, or a store does not answer: finish() gathers it all the same
                return None
            self.reported.append(loads(report))
        return merged([self.outcome.records if self.outcome is not None else {}, *self.reported])
