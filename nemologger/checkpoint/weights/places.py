"""Where the bytes of tensors lie in the files of ``weights/``, and where they would without some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from nemologger import names
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.weights.layout import PAGE, archive
from nemologger.checkpoint.weights.metadata_file import check_parts, dump_metadata, read_metadata, shapes_in
from nemologger.checkpoint.weights.reading import is_local, reading


@dataclass(frozen=True)
class Payload:
    """A piece of a tensor as :func:`lay_out` placed it: ``header`` from byte ``header_start`` of ``file`` on, then it."""

    key: str
    piece: Piece
    file: str
    header_start: int
    header: bytes


@without_collector()
def payloads(weights: Path, keys: Collection[str], metadata: Metadata | None = None) -> dict[str, list[Payload]]:
    """Where the bytes of the tensors ``keys`` lie, of those that lie there as :func:`lay_out` places them.

    Args:
        weights: The directory.
        keys: Which.
        metadata: Its ``.metadata``, if that has been read.

    Raises:
        DamagedCheckpointError: If it cannot be read, or the parts of one overlap.
    """
    read = metadata or read_metadata(weights)
    found: dict[str, list[Payload]] = {}
    with reading(weights / names.DCP_METADATA):
        sizes_of = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in read.state_dict_metadata.items()
            if key in keys and isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        for index, info in read.storage_data.items():
            described = read.state_dict_metadata.get(index.fqn)
            if index.fqn not in keys or not isinstance(described, TensorStorageMetadata):
                continue
            offsets = tuple(index.offset) if index.offset is not None else (0,) * len(described.size)
            sizes, dtype = sizes_of.get((index.fqn, offsets)), described.properties.dtype
            if sizes is None or not is_local(info.relative_path) or getattr(info, "transform_descriptors", None):
                continue
            piece = Piece(index.fqn, offsets, sizes, math.prod(sizes) * dtype.itemsize)
            header, trailer = archive(dtype, sizes)
            inside = all(o >= 0 and o + s <= whole for o, s, whole in zip(offsets, sizes, described.size, strict=True))
            if inside and info.length == len(header) + piece.nbytes + len(trailer):
                found.setdefault(index.fqn, []).append(
                    Payload(index.fqn, piece, info.relative_path, info.offset, header)
                )
        for key in found:
            check_parts(weights / names.DCP_METADATA, key, read)
    whole = {key: math.prod(sizes) * dtype.itemsize for key, (sizes, dtype) in shapes_in(read).items()}
    return {key: group for key, group in found.items() if sum(p.piece.nbytes for p in group) == whole[key]}


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
