"""One rank's share of the tensors, written into its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from nemologger import names
from nemologger.checkpoint.manifest import FileRecord, Recorder
from nemologger.checkpoint.shares import Piece, into_files
from nemologger.checkpoint.stage import payload
from nemologger.checkpoint.weights import Entry, Place, entries, lay_out
from nemologger.disk import Disk


def write_share(
    disk: Disk, weights: Path, rank: int, pieces: Sequence[Piece], tensors: Mapping[str, torch.Tensor], files: int
) -> tuple[dict[str, FileRecord], list[Entry]]:
    """Write ``pieces`` into at most ``files`` files of ``rank``.

    Returns:
        The record of each file by its name, and what ``.metadata`` has to say of them.
    """
    records: dict[str, FileRecord] = {}
    stored: list[Entry] = []
    for index, group in enumerate(into_files(pieces, files)):
        name = names.shard(rank, index)
        places = lay_out(group, tensors)
        records[name] = write_file(disk, weights / name, _parts(places, tensors))
        stored += entries(name, places)
    return records, stored


def write_file(disk: Disk, path: Path, parts: Iterator[bytes | memoryview]) -> FileRecord:
    """Write ``parts`` to ``path``, and make the record that the manifest keeps of it."""
    recorder = Recorder()
    disk.write(path, recorder.over(parts))
    return recorder.record


def _parts(places: Sequence[Place], tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    position = 0
    for place in places:
        yield bytes(place.start - position) + place.header
        yield payload(tensors[place.piece.key], place.piece)
        yield place.trailer
        position = place.end
