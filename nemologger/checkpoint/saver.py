"""Runs the stages of a save, on all ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.shares import share_out
from nemologger.checkpoint.snapshot import Snapshot
from nemologger.checkpoint.weights import BACKEND, Entry, dump_common, metadata, shape_of
from nemologger.checkpoint.write import write_file, write_share
from nemologger.disk import Disk
from nemologger.errors import CheckpointError, NemologgerError, SaveFailedError
from nemologger.ranks import Ranks, decide, together
from nemologger.store_path import in_store

log = logging.getLogger(__name__)

_READ_SIZE = 16 << 20


@dataclass(frozen=True)
class Share:
    """What one rank wrote."""

    fingerprint: str
    records: dict[str, FileRecord]
    entries: list[Entry]


class Saver:
    """Writes checkpoints.

    Args:
        disk: Where to.
        ranks: The processes that write together.
        files_per_rank: At most so many ``.distcp`` files for each rank.
    """

    def __init__(self, disk: Disk, ranks: Ranks, files_per_rank: int = 2) -> None:
        self._disk = disk
        self._ranks = ranks
        self._files_per_rank = files_per_rank

    def save(
        self,
        snapshot: Snapshot,
        checkpoint: Path,
        manifest: Manifest,
        write_context: Callable[[Path], None] | None = None,
    ) -> Manifest:
        """Write and publish ``checkpoint``. Collective.

        Args:
            snapshot: What to save; the same keys and shapes on every rank.
            checkpoint: The directory.
            manifest: Step, metrics and so on; files and versions are filled in here.
            write_context: Called on rank 0 with the directory for ``context/``.

        Returns:
            The manifest that was published.

        Raises:
            SaveFailedError: On every rank, if any of them failed. What was there before is untouched.
        """
        try:
            decide(self._ranks, lambda: commit.begin(self._disk, checkpoint))
            shares = together(self._ranks, lambda: self._write_share(snapshot, checkpoint))
            return decide(self._ranks, lambda: self._finish(snapshot, checkpoint, manifest, shares, write_context))
        except BaseException as error:
            if self._ranks.rank == 0:
                with contextlib.suppress(OSError):  # the disk that failed may fail again; the next run tidies up
                    commit.abandon(self._disk, checkpoint)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            cause = str(error) if isinstance(error, NemologgerError) else f"{type(error).__name__}: {error}"
            raise SaveFailedError(f"checkpoint {checkpoint} was not saved: {cause}") from error

    def _write_share(self, snapshot: Snapshot, checkpoint: Path) -> Share:
        shapes = {key: shape_of(tensor) for key, tensor in snapshot.tensors.items()}
        pieces = share_out(shapes, snapshot.rank_zero, self._ranks.world_size)[self._ranks.rank]
        weights = checkpoint / names.WEIGHTS
        records, entries = write_share(
            self._disk, weights, self._ranks.rank, pieces, snapshot.tensors, self._files_per_rank
        )
        self._disk.sync(weights)
        fingerprint = xxhash.xxh3_64_hexdigest(snapshot.outline.encode())
        return Share(fingerprint, records, entries)

    def _finish(
        self,
        snapshot: Snapshot,
        checkpoint: Path,
        manifest: Manifest,
        shares: list[Share],
        write_context: Callable[[Path], None] | None,
    ) -> Manifest:
        _check_shares(checkpoint, shares)
        files = {f"{names.WEIGHTS}/{name}": r for share in shares for name, r in share.records.items()}
        entries = [entry for share in shares for entry in share.entries]
        common = {**snapshot.common, OURS: {"format": manifests.FORMAT, "optimizer_names": snapshot.optimizer_names}}
        for name, content in (
            (names.COMMON, dump_common(common)),
            (names.BACKEND, BACKEND),
            (names.DCP_METADATA, metadata(snapshot.tensors, snapshot.paths, entries)),
        ):
            path = checkpoint / names.WEIGHTS / name
            files[f"{names.WEIGHTS}/{name}"] = write_file(self._disk, path, iter([content]))
        if write_context is not None:
            write_context(checkpoint / names.CONTEXT)
            files.update(_records_below(checkpoint, checkpoint / names.CONTEXT))
        complete = replace(
            manifest,
            name=checkpoint.name,
            time=manifests.now(),
            world_size=self._ranks.world_size,
            has_optimizer=snapshot.has_optimizer,
            files=files,
            versions=manifests.versions(),
        )
        commit.publish(self._disk, checkpoint, complete)
        return complete


def _check_shares(checkpoint: Path, shares: list[Share]) -> None:
    different = [rank for rank, share in enumerate(shares) if share.fingerprint != shares[0].fingerprint]
    if different:
        raise CheckpointError(
            f"ranks {different} hold other tensors than rank 0 (names, shapes or dtypes differ): the model or its "
            "optimizer is not the same on all ranks"
        )
    for rank, share in enumerate(shares):
        for name, record in share.records.items():
            path = checkpoint / names.WEIGHTS / name
            if in_store(checkpoint) is not None:
                continue  # looked at all together, before they are published
            if not path.exists() or path.stat().st_size != record.size:
                raise CheckpointError(
                    f"rank 0 does not see {path}, which rank {rank} wrote: the run directory must be on a file system "
                    "that all ranks share"
                )


def _records_below(checkpoint: Path, directory: Path) -> dict[str, FileRecord]:
    """The records of files that somebody else wrote into ``directory``."""
    records = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            recorder = manifests.Recorder()
            with path.open("rb") as file:
                for _ in recorder.over(iter(lambda file=file: file.read(_READ_SIZE), b"")):  # type: ignore[misc]
                    pass
            records[path.relative_to(checkpoint).as_posix()] = recorder.record
    return records
