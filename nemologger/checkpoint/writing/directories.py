"""The directories of a checkpoint that hold tensors: which piece goes where, and the small files that each has.

``weights/`` is always there; others of the same format may be beside it, such as averages of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import OURS
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.state.snapshot import Snapshot, home_of
from nemologger.checkpoint.weights import BACKEND, Entry, dump_common, metadata


def by_directory(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """``pieces`` by the directory that they go to."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(home_of(piece.key)[0], []).append(piece)
    return groups


def metadata_files(snapshot: Snapshot, entries: Iterable[Entry]) -> dict[str, bytes]:
    """``.metadata`` of each directory, by its path below the checkpoint.

    Args:
        snapshot: What is saved.
        entries: What all ranks have stored, under the keys of ``snapshot``.
    """
    stored: dict[str, list[Entry]] = {directory: [] for directory in snapshot.directories}
    homes = {key: home_of(key) for key in snapshot.tensors}
    for entry in entries:
        directory, inside = homes[entry.key]
        stored[directory].append(entry if inside == entry.key else replace(entry, key=inside))
    return {
        f"{directory}/{names.DCP_METADATA}": metadata(*snapshot.within(directory), stored[directory])
        for directory in snapshot.directories
    }


def common_files(snapshot: Snapshot) -> dict[str, bytes]:
    """What else rank 0 writes into each directory, by its path below the checkpoint."""
    ours = {"format": manifests.FORMAT, "optimizer_names": snapshot.optimizer_names}
    files = {f"{names.WEIGHTS}/{names.COMMON}": dump_common({**snapshot.common, OURS: ours})}
    for directory, common in snapshot.beside.items():
        files[f"{directory}/{names.COMMON}"] = dump_common({**common, OURS: {"format": manifests.FORMAT}})
    for directory in snapshot.directories:
        files[f"{directory}/{names.BACKEND}"] = BACKEND
    return files
