"""``.metadata``: a pickled ``Metadata`` that says where each piece of each tensor lies.

As in ``torch/distributed/checkpoint/{metadata,filesystem}.py`` of torch 2.10 to 2.15.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemologger import names
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.weights.layout import Entry
from nemologger.checkpoint.weights.memo import check_memo
from nemologger.checkpoint.weights.overlap import Box, overlap
from nemologger.checkpoint.weights.reading import reading
from nemologger.checkpoint.weights.unpickler import CLASSES, MetadataUnpickler
from nemologger.checkpoint.weights.untouched import untouched
from nemologger.errors import CheckpointError, DamagedCheckpointError

_VERSION = "1.0.0"


@without_collector()
def metadata(
    tensors: Mapping[str, torch.Tensor], paths: Mapping[str, tuple[str, ...]], stored: Sequence[Entry]
) -> bytes:
    """``.metadata`` of all ranks' entries.

    Raises:
        CheckpointError: If nobody has written some part of a tensor.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    # Thousands of ranks have millions of entries; of those that are equal, one object is made and pickled.
    known_sizes: dict[tuple[int, ...], torch.Size] = {}
    known_chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], ChunkStorageMetadata] = {}

    def size(of: tuple[int, ...]) -> torch.Size:
        return known_sizes.get(of) or known_sizes.setdefault(of, torch.Size(of))

    for entry in stored:
        index = MetadataIndex(entry.key, None, len(chunks[entry.key]))
        object.__setattr__(index, "offset", size(entry.offsets))  # its __init__ would copy it
        if index in storage:  # hybrid FSDP does not tell which ranks hold the same part: all have written it
            continue
        block = (entry.offsets, entry.sizes)
        if block not in known_chunks:
            known_chunks[block] = ChunkStorageMetadata(size(entry.offsets), size(entry.sizes))
        chunks[entry.key].append(known_chunks[block])
        storage[index] = _StorageInfo(entry.file, entry.start, entry.length)
    properties = {dtype: TensorProperties(dtype=dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(properties[tensor.dtype], size(tuple(tensor.shape)), chunks[key])
        for key, tensor in tensors.items()
    }
    for key, tensor in tensors.items():
        written = sum(math.prod(chunk.sizes) for chunk in chunks[key])
        if written != tensor.shape.numel():
            raise CheckpointError(f"of {key}, {written} of {tensor.shape.numel()} elements would be written")
    return dump_metadata(Metadata(described, planner_data=dict(paths), storage_data=storage, version=_VERSION))


def dump_metadata(written: Metadata) -> bytes:
    """``.metadata``, as any torch reads it."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {**copyreg.dispatch_table, TensorProperties: _reduced}
    pickler.dump(written)
    return file.getvalue()


def _reduced(properties: TensorProperties) -> tuple[Any, ...]:
    """One before torch 2.15 takes these five values only. The sixth, strides, is None here."""
    return copyreg.__newobj__, (TensorProperties,), properties.__getstate__()[:5]  # type: ignore[attr-defined, no-untyped-call]


@without_collector()
def read_metadata(weights: Path) -> Metadata:
    """``.metadata``; nothing of it is run.

    Raises:
        RefusedError: If it names anything but the classes that DCP and Megatron put there.
        DamagedCheckpointError: If it cannot be read.
    """
    path = weights / names.DCP_METADATA
    with reading(path), untouched(CLASSES, path):
        content = path.read_bytes()
        check_memo(content)
        read = MetadataUnpickler(io.BytesIO(content), path).load()
    if not isinstance(read, Metadata):
        raise DamagedCheckpointError(f"{path} holds a {type(read).__name__}, not DCP's Metadata")
    with reading(path):
        _check(read)
    return read


def _check(read: Metadata) -> None:
    """Raise what the use of ``read`` would raise elsewhere: after one flipped bit, anything may be of any kind.

    Nothing of another kind is shown: as text, a few nested tuples may take all memory.
    """
    for key, entry in read.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        if type(key) is not str or not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"a {type(entry).__name__} under a {type(key).__name__}")
        if type(entry.properties.dtype) is not torch.dtype:
            raise TypeError(f"{key} has a {type(entry.properties.dtype).__name__} for a dtype")
        dim = _dim(entry.size, key)
        for chunk in entry.chunks:
            if not dim == _dim(chunk.offsets, key) == _dim(chunk.sizes, key):
                raise ValueError(f"{key} of {dim} dimensions has parts of others")
    for index, info in read.storage_data.items():
        key, file, start, length = index.fqn, info.relative_path, info.offset, info.length
        if not (type(key) is type(file) is str and type(start) is type(length) is int and start >= 0 <= length):
            raise TypeError(f"a {type(key).__name__} is in a {type(file).__name__}, or nowhere in it")
        if index.offset is not None:
            _dim(index.offset, key)


def check_parts(path: Path, key: str, parts: Iterable[Box]) -> None:
    """Refuse the tensor ``key`` if ``parts`` of it overlap.

    Raises:
        DamagedCheckpointError: They do.
    """
    if overlap(parts):
        raise DamagedCheckpointError(f"{path}: parts of {key} overlap, which no program writes: it was not read")


def _dim(size: tuple[int, ...], key: str) -> int:
    if type(size) is tuple:  # as Megatron-FSDP has them
        size = torch.Size(size)  # takes whole numbers only
    if type(size) is not torch.Size or (size and min(size) < 0):
        raise TypeError(f"{key} has a size that is none")
    return len(size)


def described(weights: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in ``weights``, by flat key."""
    return shapes_in(read_metadata(weights))


@without_collector()
def shapes_in(read: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """As :func:`described`, of what has been read."""
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in read.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
