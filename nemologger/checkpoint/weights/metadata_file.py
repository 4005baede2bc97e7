"""``.metadata``: a pickled ``Metadata`` that says where each piece of each tensor lies.

As in ``torch/distributed/checkpoint/{metadata,filesystem}.py`` of torch 2.10 to 2.15.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
from collections.abc import Mapping, Sequence
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
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        key: TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks[key])
        for key, tensor in tensors.items()
    }
    for key, tensor in tensors.items():
        written = sum(math.prod(chunk.sizes) for chunk in chunks[key])
        if written != tensor.shape.numel():
            raise CheckpointError(f"of {key}, {written} of {tensor.shape.numel()} elements would be written")
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {**copyreg.dispatch_table, TensorProperties: _reduced}
    pickler.dump(Metadata(described, planner_data=dict(paths), storage_data=storage, version=_VERSION))
    return file.getvalue()


def _reduced(properties: TensorProperties) -> tuple[Any, ...]:
    """As any torch reads it: one before 2.15 takes these five values only. The sixth, strides, is None here."""
    return copyreg.__newobj__, (TensorProperties,), properties.__getstate__()[:5]  # type: ignore[attr-defined, no-untyped-call]


@without_collector()
def read_metadata(weights: Path) -> Metadata:
    """``.metadata``; nothing of it is run.

    Raises:
        RefusedError: If it names anything but the classes that DCP and Megatron put there.
        DamagedCheckpointError: If it cannot be read.
    """
    path = weights / names.DCP_METADATA
    with reading(path), path.open("rb") as file, untouched(CLASSES, path):
        read = MetadataUnpickler(file, path).load()
    if not isinstance(read, Metadata):
        raise DamagedCheckpointError(f"{path} holds a {type(read).__name__}, not DCP's Metadata")
    with reading(path):
        shapes_in(read)  # one flipped bit in a name, and something has not what it must have
    return read


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
