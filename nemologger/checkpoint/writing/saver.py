"""Runs the stages of a save, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.writing.directories import common_files
from nemologger.checkpoint.writing.ending import abandon, not_saved, publish
from nemologger.checkpoint.writing.plan import Plan, Planner
from nemologger.checkpoint.writing.reports import merged
from nemologger.checkpoint.writing.write import write_file, write_share
from nemologger.disk import Disk
from nemologger.disk.there import exists, is_file
from nemologger.errors import CheckpointError, SilentRankError
from nemologger.ranks import Ranks, decide, together_at_zero
from nemologger.stores.path import in_store

log = logging.getLogger(__name__)

_READ_SIZE = 16 << 20

ContextWriter = Callable[[Path], Mapping[str, FileRecord] | None]


class Saver:
    """Writes checkpoints.

    Args:
        disk: Where to.
        ranks: The processes that write together.
        planner: Says what each rank writes; default a new one.
    """

    def __init__(self, disk: Disk, ranks: Ranks, planner: Planner | None = None) -> None:
        self._disk = disk
        self._ranks = ranks
        self._planner = planner or Planner(ranks)

    def save(
        self,
        snapshot: Snapshot,
        checkpoint: Path,
        manifest: Manifest,
        write_context: ContextWriter | None = None,
    ) -> Manifest:
        """Write and publish ``checkpoint``. Collective.

        Args:
            snapshot: What to save; the same keys and shapes on every rank.
            checkpoint: The directory.
            manifest: Step, metrics and so on; files and versions are filled in here.
            write_context: Called on rank 0 with the directory for ``context/``; gives the records of what it has written, by
                path below the checkpoint, or None if that is to be read again.

        Returns:
            The manifest that was published.

        Raises:
            SaveFailedError: On every rank, if any of them failed. What was there before is untouched.
            SilentRankError: If one of them has died. What was there before is untouched.
        """
        try:
            decide(self._ranks, lambda: commit.begin(self._disk, checkpoint, snapshot.directories))
            plan = self._planner.plan(snapshot)
            shares = together_at_zero(self._ranks, lambda: self._write_share(plan, snapshot, checkpoint))
            return decide(
                self._ranks, lambda: self._finish(plan, snapshot, checkpoint, manifest, shares, write_context)
            )
        except BaseException as error:
            abandon(self._disk, self._ranks, checkpoint)
            if not isinstance(error, Exception) or isinstance(error, SilentRankError):  # Ctrl-C; nobody to go on with
                raise
            raise not_saved(checkpoint, error) from error

    def _write_share(self, plan: Plan, snapshot: Snapshot, checkpoint: Path) -> dict[str, FileRecord]:
        records = write_share(self._disk, checkpoint, plan.files, plan.reader(snapshot))
        for directory in snapshot.directories:
            self._disk.sync(checkpoint / directory)
        return records

    def _finish(
        self,
        plan: Plan,
        snapshot: Snapshot,
        checkpoint: Path,
        manifest: Manifest,
        shares: list[dict[str, FileRecord]],
        write_context: ContextWriter | None,
    ) -> Manifest:
        _check_shares(checkpoint, shares)
        files = merged(shares)
        for name, content in {**common_files(snapshot), **plan.metadata}.items():
            files[name] = write_file(self._disk, checkpoint / name, iter([content]))
        if write_context is not None:
            written = write_context(checkpoint / names.CONTEXT)
            files.update(_records_below(checkpoint, checkpoint / names.CONTEXT) if written is None else written)
        named = replace(manifest, name=checkpoint.name, has_optimizer=snapshot.has_optimizer)
        return publish(self._disk, self._ranks, checkpoint, named, files)


def _check_shares(checkpoint: Path, shares: list[dict[str, FileRecord]]) -> None:
    if in_store(checkpoint) is not None:
        return  # looked at all together, before they are published
    for rank, share in enumerate(shares):
        for name, record in share.items():
            path = checkpoint / name
            if not exists(path):
                raise CheckpointError(
                    f"rank 0 does not see {path}, which rank {rank} wrote: the run directory must be on a file system "
                    "that all ranks share"
                )
            found = path.stat().st_size
            if found != record.size:
                raise CheckpointError(
                    f"rank 0 finds {found} bytes in {path}, and rank {rank} wrote {record.size}: the file system has not "
                    "kept them, or the ranks do not share it. The run directory must be on one that does both"
                )


def _records_below(checkpoint: Path, directory: Path) -> dict[str, FileRecord]:
    """The records of files that somebody else wrote into ``directory``."""
    records = {}
    for path in sorted(directory.rglob("*")):
        if is_file(path):
            recorder = manifests.Recorder()
            with path.open("rb") as file:
                for _ in recorder.over(iter(lambda file=file: file.read(_READ_SIZE), b"")):  # type: ignore[misc]
                    pass
            records[path.relative_to(checkpoint).as_posix()] = recorder.record
    return records
