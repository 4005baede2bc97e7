"""One rank's share of the tensors, written into its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from nemologger.checkpoint.manifest import FileRecord, Recorder, check_unpublished
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.state.stage import payload
from nemologger.checkpoint.weights import Place
from nemologger.disk import Disk


def write_share(
    disk: Disk, checkpoint: Path, files: Mapping[str, Sequence[Place]], read: Callable[[Piece], torch.Tensor]
) -> dict[str, FileRecord]:
    """Write ``files``.

    Args:
        disk: Where to.
        checkpoint: The directory.
        files: For each file, by its path below the checkpoint, the places of its pieces.
        read: Gives the values of a piece.

    Returns:
        The record of each file by the same path.

    Raises:
        OSError: If that failed; a FileExistsError if ``checkpoint`` is complete already.
    """
    records = {}
    for name, places in files.items():
        if disk.can_rename:  # a store overwrites nothing
            check_unpublished(checkpoint)
        records[name] = write_file(disk, checkpoint / name, _parts(places, read))
    return records


def write_file(disk: Disk, path: Path, parts: Iterator[bytes | memoryview]) -> FileRecord:
    """Write ``parts`` to ``path``, and make the record that the manifest keeps of it."""
    recorder = Recorder()
    disk.write(path, recorder.over(parts))
    return recorder.record


def _parts(places: Sequence[Place], read: Callable[[Piece], torch.Tensor]) -> Iterator[bytes | memoryview]:
    position = 0
    for place in places:
        yield bytes(place.start - position) + place.header
        yield payload(read(place.piece))
        yield place.trailer
        position = place.end
