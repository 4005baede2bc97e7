"""``weights/`` in the format of torch's distributed checkpoint (DCP). The only file that imports DCP.

A ``.distcp`` file is a row of ``torch.save`` archives, one per piece of a tensor; ``.metadata`` is a pickled ``Metadata``
that says where each lies. Without the archive's own CRCs (the manifest has checksums) the bytes around a payload do not
depend on the data: they are made once per dtype and shape, and a save moves nothing but payloads.

Reading runs no code of the file: ``.metadata`` is unpickled with an allow-list, and everything else by
``torch.load(weights_only=True)``.

Formats: ``torch/distributed/checkpoint/{metadata,filesystem}.py`` of torch 2.10 to 2.13; ``common.pt`` and
``metadata.json`` as Megatron-core 0.14 writes them (``core/dist_checkpointing/core.py``).
"""

from __future__ import annotations

import gc
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum, EnumMeta
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.futures import Future

from nemologger import names
from nemologger.checkpoint.shares import Piece
from nemologger.checkpoint.untouched import untouched
from nemologger.errors import CheckpointError, DamagedCheckpointError, NemologgerError, RefusedError
from nemologger.store_path import in_store

BACKEND: bytes = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()

_VERSION = "1.0.0"
# A payload of at least a page starts on one, so that it can be written and read past the page cache.
_PAGE = 4096
_SMALL = 64


@dataclass(frozen=True)
class Place:
    """Where a piece lies in its file: ``header``, then its payload, then ``trailer``, from byte ``start`` on."""

    piece: Piece
    start: int
    header: bytes
    trailer: bytes

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + len(self.header) + self.piece.nbytes + len(self.trailer)


@dataclass(frozen=True)
class Entry:
    """What ``.metadata`` says of a piece: its file there, and where in it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def lay_out(pieces: Iterable[Piece], tensors: Mapping[str, torch.Tensor]) -> list[Place]:
    """Give each piece of one file its place."""
    places = []
    position = 0
    for piece in pieces:
        header, trailer = _archive(tensors[piece.key].dtype, piece.sizes)
        payload = _aligned(position + len(header), _PAGE if piece.nbytes >= _PAGE else _SMALL)
        places.append(Place(piece, payload - len(header), header, trailer))
        position = places[-1].end
    return places


def entries(file: str, places: Iterable[Place]) -> list[Entry]:
    """What ``.metadata`` says of ``places`` in ``file``."""
    return [Entry(p.piece.key, p.piece.offsets, p.piece.sizes, file, p.start, p.end - p.start) for p in places]


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of new objects, none of them garbage, would be looked through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
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
    return pickle.dumps(Metadata(described, planner_data=dict(paths), storage_data=storage, version=_VERSION))


def dump_common(common: Mapping[str, Any]) -> bytes:
    """``common.pt``."""
    buffer = io.BytesIO()
    torch.save(dict(common), buffer)
    return buffer.getvalue()


def read_common(weights: Path) -> dict[str, Any]:
    """What ``common.pt`` holds; nothing of it is run.

    Raises:
        RefusedError: If it holds more than plain types.
        DamagedCheckpointError: If it cannot be read.
    """
    path = weights / names.COMMON
    with _reading(path):
        content = path if in_store(path) is None else io.BytesIO(path.read_bytes())
        common: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    return common


@_without_collector()
def read_metadata(weights: Path) -> Metadata:
    """``.metadata``; nothing of it is run.

    Raises:
        RefusedError: If it names anything but the classes that DCP and Megatron put there.
        DamagedCheckpointError: If it cannot be read.
    """
    path = weights / names.DCP_METADATA
    with _reading(path), path.open("rb") as file, untouched(_CLASSES, path):
        read = _MetadataUnpickler(file, path).load()
    if not isinstance(read, Metadata):
        raise DamagedCheckpointError(f"{path} holds a {type(read).__name__}, not DCP's Metadata")
    return read


def described(weights: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in ``weights``, by flat key."""
    return _described(read_metadata(weights))


def _described(read: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in read.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@dataclass(frozen=True)
class Payload:
    """A piece of a tensor as :func:`lay_out` placed it: ``header`` from byte ``header_start`` of ``file`` on, then it."""

    key: str
    piece: Piece
    file: str
    header_start: int
    header: bytes


@_without_collector()
def payloads(weights: Path, keys: Collection[str]) -> dict[str, list[Payload]]:
    """Where the bytes of the tensors ``keys`` lie, of those that lie there as :func:`lay_out` places them."""
    read = read_metadata(weights)
    found: dict[str, list[Payload]] = {}
    with _reading(weights / names.DCP_METADATA):
        sizes_of = {
            (key, tuple(chunk.offsets)): tuple(chunk.sizes)
            for key, entry in read.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        for index, info in read.storage_data.items():
            described = read.state_dict_metadata.get(index.fqn)
            if index.fqn not in keys or not isinstance(described, TensorStorageMetadata):
                continue
            offsets = tuple(index.offset) if index.offset is not None else (0,) * len(described.size)
            sizes, dtype = sizes_of.get((index.fqn, offsets)), described.properties.dtype
            if sizes is None or not _is_local(info.relative_path) or getattr(info, "transform_descriptors", None):
                continue
            piece = Piece(index.fqn, offsets, sizes, math.prod(sizes) * dtype.itemsize)
            header, trailer = _archive(dtype, sizes)
            inside = all(o >= 0 and o + s <= whole for o, s, whole in zip(offsets, sizes, described.size, strict=True))
            if inside and info.length == len(header) + piece.nbytes + len(trailer):
                found.setdefault(index.fqn, []).append(
                    Payload(index.fqn, piece, info.relative_path, info.offset, header)
                )
    whole = {key: math.prod(sizes) * dtype.itemsize for key, (sizes, dtype) in _described(read).items()}
    return {key: group for key, group in found.items() if sum(p.piece.nbytes for p in group) == whole[key]}


def _is_local(file: str) -> bool:
    """Whether ``file`` names a file of the directory itself."""
    return isinstance(file, str) and file not in ("", ".", "..") and "/" not in file


@dataclass(frozen=True)
class Move:
    """``length`` bytes of a file, from byte ``start`` on, that are to lie from byte ``target`` on."""

    start: int
    length: int
    target: int


@_without_collector()
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
    with _reading(weights / names.DCP_METADATA):
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
                own.append(Move(info.offset, info.length, end + (info.offset - end) % _PAGE))
                storage[index] = replace(info, offset=own[-1].target)
                end = own[-1].target + info.length
        tensors = {key: entry for key, entry in read.state_dict_metadata.items() if not dropped(key)}
        paths = {key: path for key, path in read.planner_data.items() if not dropped(key)}
    return (
        pickle.dumps(replace(read, state_dict_metadata=tensors, planner_data=paths, storage_data=storage)),
        moves,
    )


def read_ordinary(weights: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors`` from ``weights`` as torch's distributed checkpoint does.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing or cannot be read.
    """
    with _reading(weights), warnings.catch_warnings():
        # A hint that one process reads all of it; every rank does.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, storage_reader=_Reader(weights), no_dist=True)


# What torch raises over bytes that are not what they should be.
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    MemoryError,
)


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn what torch raises into errors that name ``path``."""
    try:
        yield
    except NemologgerError:
        raise
    except CheckpointException as failed:  # derives from BaseException
        first = next(iter(failed.failures.values()))[0]
        if isinstance(first, NemologgerError):
            raise first from failed
        raise DamagedCheckpointError(f"{path} cannot be read: {type(first).__name__}: {first}") from failed
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            raise RefusedError(f"{path} holds more than plain types and was not loaded: {error}") from error
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    except _UNREADABLE as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


class _Files(FileSystem):
    """DCP's way to files, for paths that may be of a store."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        if not _is_local(suffix):
            raise RefusedError(f"{path / names.DCP_METADATA} names a file outside of {path}, {suffix}: it was not read")
        return path / suffix


class _Reader(FileSystemReader):
    """DCP's reader, for files from strangers."""

    def __init__(self, weights: Path) -> None:
        super().__init__(str(weights))
        self.fs, self.path = _Files(), weights

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception:
            for item in plan.items:  # once more, one by one, to say which it is
                with _reading(f"{self.path}, entry {item.dest_index.fqn}"):
                    super().read_data(replace(plan, items=[item]), planner)
            raise

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read = read_metadata(cast(Path, self.path))
        read.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return read


@dataclass(frozen=True)
class _MegatronPlan(SavePlan):
    """Stands in for the one class of Megatron-core that its ``.metadata`` names."""

    mcore_data: dict[str, Any] | None = None


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ADMITTED.get((module, name))
        if allowed is not None:
            return allowed
        dtype = vars(torch).get(name)  # not getattr: torch imports parts of itself when they are asked for
        if module == "torch" and isinstance(dtype, torch.dtype):
            return dtype
        raise RefusedError(f"{self._path} names {module}.{name}, which no checkpoint needs: it was not loaded")


# A pickle can set attributes of what it names. So where it may name something that all the program uses, it gets a
# function of ours instead, or a class that is put right afterwards.


def _path(*parts: str) -> Path:
    return Path(*parts)


def _layout(name: str) -> Any:
    return cast(Any, torch.serialization)._get_layout(name)


def _member(kind: Any, name: Any) -> Enum:
    """A member of an enum, which Python before 3.11.4 pickles as its attribute."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise RefusedError(f"builtins.getattr of {kind!r}, {name!r}: no checkpoint needs that, it was not loaded")
    return cast(Enum, kind.__members__[name])


_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        (dcp_planner.__name__, name): getattr(dcp_planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _MegatronPlan,
    ("builtins", "getattr"): _member,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")  # Python 3.13 has it there
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}

_CLASSES = [kind for kind in _ADMITTED.values() if isinstance(kind, type)]


@lru_cache(maxsize=4096)
def _archive(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the payload of such a tensor."""
    sample = torch.empty(sizes, dtype=dtype)
    sink = _AroundPayload(sample.nbytes)
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(sample, cast(Any, sink))
    finally:
        torch.serialization.set_crc32_options(checked)
    return sink.parts()


class _AroundPayload(io.RawIOBase):
    """A file that forgets the largest thing written to it, unless that is small enough to search for."""

    def __init__(self, payload: int) -> None:
        self._payload = payload
        self._before = bytearray()
        self._after: bytearray | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        # The records that torch writes around a payload are all smaller than a page.
        if self._after is None and self._payload >= _PAGE and len(view) == self._payload:
            self._after = bytearray()
        else:
            (self._before if self._after is None else self._after).extend(view)
        return len(view)

    def parts(self) -> tuple[bytes, bytes]:
        if self._after is not None:
            return bytes(self._before), bytes(self._after)
        whole = bytes(self._before)
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(whole))
        offset = reader.get_record_offset("data/0")
        return whole[:offset], whole[offset + self._payload :]


def _aligned(position: int, to: int) -> int:
    return -(-position // to) * to
