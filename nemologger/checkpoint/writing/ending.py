"""How a save ends: published by rank 0, or abandoned by it and raised by all."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from nemologger.checkpoint import commit
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.disk import Disk
from nemologger.errors import NemologgerError, SaveFailedError
from nemologger.ranks import Ranks


def publish(disk: Disk, ranks: Ranks, checkpoint: Path, manifest: Manifest, files: dict[str, FileRecord]) -> Manifest:
    """Publish ``checkpoint``, whose ``files`` are written, with a manifest that has them, the time and the versions."""
    complete = replace(
        manifest,
        time=manifests.now(),
        world_size=ranks.world_size,
        files=files,
        versions=manifests.versions(),
    )
    commit.publish(disk, checkpoint, complete)
    return complete


def abandon(disk: Disk, ranks: Ranks, checkpoint: Path) -> None:
    """On rank 0, remove what there is of ``checkpoint``; on the others, nothing."""
    if ranks.rank == 0:
        with contextlib.suppress(OSError):  # the disk that failed may fail again; the next run tidies up
            commit.abandon(disk, checkpoint)


def not_saved(checkpoint: Path, error: Exception) -> SaveFailedError:
    """What is raised when ``error`` was why."""
    return SaveFailedError(f"checkpoint {checkpoint} was not saved: {cause_of(error)}")


def cause_of(error: Exception) -> str:
    """``error`` in the words of an error of ours."""
    return str(error) if isinstance(error, NemologgerError) else f"{type(error).__name__}: {error}"
