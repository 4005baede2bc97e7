"""Where the bytes of tensors lie in the files of ``weights/``, and where they would without some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from nemologger import names
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.weights.layout import PAGE, archive
from nemologger.checkpoint.weights.metadata_file import check_parts, dump_metadata, read_metadata
from nemologger.checkpoint.weights.overlap import Box, common
from nemologger.checkpoint.weights.reading import is_local, reading
from nemologger.errors import DamagedCheckpointError


@dataclass(frozen=True)
class Payload:
    """A piece of a tensor as :func:`lay_out` placed it: ``header`` from byte ``header_start`` of ``file`` on, then it."""

    key: str
    piece: Piece
    file: str
    header_start: int
    header: bytes


@without_collector()
def payloads(weights: Path, parts: Mapping[str, Box], metadata: Metadata | None = None) -> dict[str, list[Payload]]:
    """Where the bytes of parts of tensors lie: all pieces that have something of them.

    Of thousands of ranks each needs its own part of every tensor, out of millions of pieces in thousands of files.

    Args:
        weights: The directory.
        parts: By flat key, which part of the tensor: where it begins, and its sizes.
        metadata: Its ``.metadata``, if that has been read.

    Returns:
        By key. What lies elsewhere than :func:`lay_out` would place it, even in part, is left out.

    Raises:
        DamagedCheckpointError: If it cannot be read, or such pieces of one tensor overlap, or one is in two places.
    """
    read, path = metadata or read_metadata(weights), weights / names.DCP_METADATA
    with reading(path):
        stored = {
            key: described
            for key in parts
            if isinstance(described := read.state_dict_metadata.get(key), TensorStorageMetadata)
        }
        needed = {
            key: {
                tuple(chunk.offsets): tuple(chunk.sizes)
                for chunk in described.chunks
                if common((chunk.offsets, chunk.sizes), parts[key]) is not None
            }
            for key, described in stored.items()
        }
        found: dict[str, dict[tuple[int, ...], Payload | None]] = {key: {} for key in stored}
        for index, info in read.storage_data.items():
            if (own := needed.get(index.fqn)) is None:
                continue
            whole = stored[index.fqn]
            offsets = (0,) * len(whole.size) if index.offset is None else tuple(index.offset)
            if (sizes := own.get(offsets)) is not None:
                if offsets in found[index.fqn]:  # counted twice, it would stand for one that is in no file
                    raise DamagedCheckpointError(f"{path}: a part of {index.fqn} is in two places: it was not read")
                found[index.fqn][offsets] = _placed(index.fqn, whole, (offsets, sizes), info)
        for key in stored:
            check_parts(path, key, needed[key].items())
    groups = {key: [one for one in group.values() if one is not None] for key, group in found.items()}
    return {key: group for key, group in groups.items() if _covered(group, parts[key]) == math.prod(parts[key][1])}


def _placed(key: str, whole: TensorStorageMetadata, box: Box, info: _StorageInfo) -> Payload | None:
    """The piece ``box`` of a tensor, if it lies in its file as :func:`lay_out` places it."""
    offsets, sizes = box
    inside = all(o >= 0 and o + s <= end for o, s, end in zip(offsets, sizes, whole.size, strict=True))
    if not inside or not is_local(info.relative_path) or getattr(info, "transform_descriptors", None):
        return None
    dtype = whole.properties.dtype
    piece = Piece(key, offsets, sizes, math.prod(sizes) * dtype.itemsize)
    header, trailer = archive(dtype, sizes)
    if info.length != len(header) + piece.nbytes + len(trailer):
        return None
    return Payload(key, piece, info.relative_path, info.offset, header)


def _covered(group: Iterable[Payload], part: Box) -> int:
    """How many elements of ``part`` are in ``group``, of which no two overlap."""
    shared = (common((one.piece.offsets, one.piece.sizes), part) for one in group)
    return sum(math.prod(box[1]) for box in shared if box is not None)


@dataclass(frozen=True)
class Move:
    """``length`` bytes of a file, from byte ``start`` on, that are to lie from byte ``target`` on."""

    start: int
    length: int
    target: int


@without_collector()
def without(weights: Path, dropped: Callable[[str], bool]) -> tuple[bytes, dict[str, list[Move] | None]]:
    """What ``weights`` would be without the tensors whose flat keys are ``dropped``.

    Returns:
        Its ``.metadata``, and for each file what stays of it: None for all, as it is; an empty list for nothing.
        What moves keeps its place within a page.

    Raises:
        RefusedError: If reading ``.metadata`` would run code.
        DamagedCheckpointError: If it cannot be read.
    """
    read = read_metadata(weights)
    with reading(weights / names.DCP_METADATA):
        by_file: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for index, info in read.storage_data.items():
            by_file.setdefault(info.relative_path, []).append((index, info))
        storage: dict[MetadataIndex, _StorageInfo] = {}
        moves: dict[str, list[Move] | None] = {}
        for file, stored in by_file.items():
            staying = [(index, info) for index, info in stored if not dropped(index.fqn)]
            if len(staying) == len(stored):
                storage.update(staying)
                moves[file] = None
                continue
            moves[file] = own = []
            end = 0
            for index, info in sorted(staying, key=lambda one: one[1].offset):
                own.append(Move(info.offset, info.length, end + (info.offset - end) % PAGE))
                storage[index] = replace(info, offset=own[-1].target)
                end = own[-1].target + info.length
        tensors = {key: entry for key, entry in read.state_dict_metadata.items() if not dropped(key)}
        paths = {key: path for key, path in read.planner_data.items() if not dropped(key)}
    return (
        dump_metadata(replace(read, state_dict_metadata=tensors, planner_data=paths, storage_data=storage)),
        moves,
    )
