"""A save that is under way beside training, seen from one rank."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nemologger import names
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.writing.reports import loads, merged, report_of
from nemologger.checkpoint.writing.staging import Staging
from nemologger.checkpoint.writing.writer_main import Job, Outcome
from nemologger.errors import SaveFailedError
from nemologger.stores.path import in_store


class WriterError(Exception):
    """What was raised in the writer process: its traceback, as text, to be shown with the error that it leads to."""


@dataclass
class InFlight:
    """How far it is.

    Attributes:
        checkpoint: The directory.
        manifest: What is said of it; files and versions are not known yet.
        job: What the writer process is to do.
        staging: The copies, until they are done and the job is handed to the writer.
        outcome: What the writer said, once it has.
        error: What went wrong, or "".
        details: The traceback of it, from the writer process, or "".
        gathered: The files of all ranks, on the rank that publishes, once it knows them.
        published: The manifest, on the rank that has published it.
        uploaded: Bytes that this rank has sent to a store.
        reported: On rank 0, what the other ranks have reported, from rank 1 on.
    """

    checkpoint: Path
    manifest: Manifest
    job: Job
    staging: Staging | None = None
    outcome: Outcome | None = None
    error: str = ""
    details: str = ""
    gathered: dict[str, FileRecord] | None = None
    published: Manifest | None = None
    uploaded: int = 0
    reported: list[dict[str, FileRecord]] = field(default_factory=list)
    _seen: object = None
    _moved: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of this rank's large files."""
        return sum(size for _, _, size in self.job.images)

    @property
    def written(self) -> int:
        """How many of them are there, or on their way to a store, which shows a file when all of it is there."""
        if self.job.store is not None:
            return min(self.uploaded, self.size)
        total = 0
        for name, _, _ in self.job.images:
            path = self.checkpoint / name
            for file in (path, path.with_name(f".{path.name}.partial")):
                with contextlib.suppress(OSError):  # it is renamed between one look and the next
                    total += file.stat().st_size
                    break
        return total

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
