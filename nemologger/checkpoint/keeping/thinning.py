"""A checkpoint without its optimizer: what stays of one when newer ones are there to resume from.

What is published is never changed. A successor is written beside it under a hidden name, shares all bytes that stay (hard
links), and takes the name over in the end (:func:`nemologger.checkpoint.commit.supersede`). Where model and optimizer have
files of their own, as :class:`~nemologger.checkpoint.writing.plan.Planner` can arrange, no tensor is read or written for
that; of a file with both, the model's part is copied.

Rank 0 alone does this, for the files of all ranks, and asks nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nemologger import names
from nemologger.checkpoint import commit
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.manifest import FileRecord, Manifest
from nemologger.checkpoint.state.snapshot import is_of_optimizer
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.weights import Move, dump_common, read_common, without
from nemologger.checkpoint.writing.write import write_file
from nemologger.disk import Disk
from nemologger.disk.local import naming
from nemologger.errors import DamagedCheckpointError

_RESUMING = ("optimizer_states", "lr_schedulers")
_READ_SIZE = 16 << 20


def thin(disk: Disk, checkpoint: Path) -> None:
    """Replace ``checkpoint`` by a successor of the same name without optimizers and schedulers; at once if it is one.

    Raises:
        DamagedCheckpointError: If what is to be read of it is not as it was written. It stays as it is.
        OSError: If the successor could not be written, or not take over. The checkpoint is there as it was.
    """
    manifest = manifests.read(checkpoint)
    if not manifest.has_optimizer:
        return
    fresh = checkpoint.with_name(f".{checkpoint.name}.partial")  # what a dead run leaves of it, the next one removes
    try:
        disk.remove(fresh)
        files = _write(disk, checkpoint, fresh, manifest)
        commit.supersede(disk, checkpoint, fresh, replace(manifest, has_optimizer=False, files=files))
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(fresh)
        raise


def _write(disk: Disk, checkpoint: Path, fresh: Path, manifest: Manifest) -> dict[str, FileRecord]:
    weights = checkpoint / names.WEIGHTS
    metadata, moves = without(weights, is_of_optimizer)
    small = {names.DCP_METADATA: metadata, names.COMMON: _thin_common(weights)}
    wanted: dict[str, Iterator[bytes]] = {f"{names.WEIGHTS}/{file}": iter([data]) for file, data in small.items()}
    wanted |= {f"{names.WEIGHTS}/{file}": _moved(weights / file, some) for file, some in moves.items() if some}
    # New bytes get new checksums: damage must not become part of them.
    if wrong := problems(checkpoint, shallow=lambda file: file not in wanted):
        raise DamagedCheckpointError(f"{checkpoint}: {wrong[0]}")
    going = {f"{names.WEIGHTS}/{file}" for file, some in moves.items() if some == []}
    files: dict[str, FileRecord] = {}
    for file, record in manifest.files.items():
        if file in going:
            continue
        disk.make_directory((fresh / file).parent)
        if file in wanted:
            files[file] = write_file(disk, fresh / file, wanted[file])
        else:
            disk.link(checkpoint / file, fresh / file)
            files[file] = record
    return files


def _thin_common(weights: Path) -> bytes:
    common = {key: value for key, value in read_common(weights).items() if key not in _RESUMING}
    return dump_common({**common, OURS: {**common.get(OURS, {}), "optimizer_names": []}})


def _moved(source: Path, moves: Sequence[Move]) -> Iterator[bytes]:
    """The parts of a file that stay, and the gaps between their new places."""
    position = 0
    with source.open("rb", buffering=0) as file:
        for move in moves:
            yield bytes(move.target - position)
            file.seek(move.start)
            position = move.target + move.length
            left = move.length
            while left:
                with naming(source):
                    part = file.read(min(left, _READ_SIZE))
                if not part:
                    raise DamagedCheckpointError(f"{source} ends in the middle of a tensor")
                left -= len(part)
                yield part
