"""Tensors straight from their files into their own memory, in parallel; no second copy, and nothing is unpickled.

That works for what :mod:`~nemologger.checkpoint.write` wrote, on whatever number of ranks. Anything else (files of NeMo, of
torch itself) goes the ordinary way of torch's distributed checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nemologger.checkpoint.blocks import CheckedFile, Part
from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.shards import held, part_of, sharded_like
from nemologger.checkpoint.shares import Piece
from nemologger.checkpoint.stage import memory_of
from nemologger.checkpoint.weights import Payload, described, payloads, read_ordinary
from nemologger.errors import DamagedCheckpointError

_CHUNK = 16 << 20
_THREADS = 4


@dataclass(frozen=True)
class Block:
    """A part of a tensor to read: ``memory`` on the CPU, contiguous, and where it begins in the whole."""

    memory: torch.Tensor
    offsets: tuple[int, ...]


def read_tensors(
    weights: Path,
    wanted: Callable[[str], bool] = lambda key: True,
    template: Callable[[str, tuple[int, ...]], torch.Tensor | None] = lambda key, sizes: None,
    records: Mapping[str, FileRecord] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` under their flat keys.

    Args:
        weights: The directory.
        wanted: Which keys to read; default all.
        template: For a key and the size of its tensor, a tensor that it is to be sharded like; of that, only this rank's
            part is read. None for all of it, on the CPU.
        records: Files of ``weights`` that are to be read as a whole and compared with their checksums on the way.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, cannot be read, or is not as it was written.
    """
    stored = {key: one for key, one in described(weights).items() if wanted(key)}
    templates = {key: like for key, (sizes, _) in stored.items() if (like := template(key, sizes)) is not None}
    blocks = {key: _block(sizes, dtype, templates.get(key), key) for key, (sizes, dtype) in stored.items()}
    read_blocks(weights, blocks, records or {})
    return {
        key: sharded_like(block.memory, templates[key]) if key in templates else block.memory
        for key, block in blocks.items()
    }


def read_blocks(weights: Path, blocks: Mapping[str, Block], records: Mapping[str, FileRecord] | None = None) -> None:
    """Fill ``blocks`` with their parts of the tensors of ``weights``; ``records`` as in :func:`read_tensors`.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, cannot be read, or is not as it was written.
    """
    with ExitStack() as files, ThreadPoolExecutor(_THREADS, thread_name_prefix="nemologger-read") as pool:
        opened = _Files(weights, files)
        # A header that is not as expected was written by another torch, or by chance has the same length.
        known = {
            key: group
            for key, group in payloads(weights, blocks.keys()).items()
            if all(opened.has_header(payload) for payload in group)
        }
        _read_ordinary(weights, {key: block for key, block in blocks.items() if key not in known})
        jobs = [job for key, group in known.items() for payload in group for job in _jobs(opened, payload, blocks[key])]
        for _ in pool.map(lambda run: run(), list(_runs(opened, jobs, records or {}))):
            pass


def _block(sizes: tuple[int, ...], dtype: torch.dtype, template: torch.Tensor | None, key: str) -> Block:
    if template is None:
        return Block(torch.empty(sizes, dtype=dtype), (0,) * len(sizes))
    part = held(template, key)
    return Block(torch.empty(part.shape.sizes, dtype=dtype), part.offsets)


def _read_ordinary(weights: Path, blocks: Mapping[str, Block]) -> None:
    """Read ``blocks`` as DCP does: it reads whole tensors."""
    sizes = described(weights) if blocks else {}
    whole = {
        key: block.memory
        if sizes[key][0] == tuple(block.memory.shape)
        else torch.empty(sizes[key][0], dtype=sizes[key][1])
        for key, block in blocks.items()
    }
    if whole:
        read_ordinary(weights, whole)
    for key, block in blocks.items():
        if whole[key] is not block.memory:
            piece = Piece(key, block.offsets, tuple(block.memory.shape), block.memory.nbytes)
            block.memory.copy_(part_of(whole[key], piece))


def _runs(
    files: _Files, jobs: Sequence[_Job | _StridedJob], records: Mapping[str, FileRecord]
) -> Iterator[Callable[[], None]]:
    """What there is to do, in the order of the files: whole blocks of those that have a record, else only what is wanted."""
    jobs = sorted(jobs, key=lambda job: (job.path, job.position))
    for name, record in sorted(records.items()):
        parts: list[Part] = []
        for job in jobs:
            if job.path.name != name:
                continue
            part = Part(job.position, job.target) if isinstance(job, _Job) else None
            if part is not None and part.end <= record.size and (not parts or parts[-1].end <= part.start):
                parts.append(part)
            else:
                yield job.run  # not in one run, or nothing of ours: read by itself
        file = CheckedFile(files.descriptor(name), files.path(name), parts, record)
        yield from (partial(file.read, number) for number in range(len(record.blocks)))
    yield from (job.run for job in jobs if job.path.name not in records)


class _Files:
    """The weights files, each opened once."""

    def __init__(self, weights: Path, files: ExitStack) -> None:
        self._weights = weights
        self._files = files
        self._descriptors: dict[str, int] = {}

    def path(self, file: str) -> Path:
        return self._weights / file

    def descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            try:
                descriptor = os.open(self.path(file), os.O_RDONLY)
            except OSError as error:
                raise DamagedCheckpointError(f"{self.path(file)} cannot be read: {error.strerror}") from error
            self._files.callback(os.close, descriptor)
            self._descriptors[file] = descriptor
        return self._descriptors[file]

    def has_header(self, payload: Payload) -> bool:
        return os.pread(self.descriptor(payload.file), len(payload.header), payload.header_start) == payload.header


@dataclass(frozen=True)
class _Job:
    descriptor: int
    path: Path
    position: int
    target: memoryview

    def run(self) -> None:
        target, position = self.target, self.position
        while target:
            count = os.preadv(self.descriptor, [target], position)
            if count == 0:
                raise DamagedCheckpointError(f"{self.path} ends at byte {position}, in the middle of a tensor")
            target, position = target[count:], position + count


def _jobs(files: _Files, payload: Payload, block: Block) -> Iterator[_Job | _StridedJob]:
    """What to read of ``payload`` for ``block``: what both have in common."""
    common = overlap(payload.piece, block)
    if common is None:
        return
    descriptor, path = files.descriptor(payload.file), files.path(payload.file)
    start = payload.header_start + len(payload.header)
    stored = tuple(common.offsets[i] - payload.piece.offsets[i] for i in range(len(common.sizes)))
    target = part_of(block.memory, common, block.offsets)
    if is_one_run(payload.piece.sizes, common.sizes) and is_one_run(tuple(block.memory.shape), common.sizes):
        memory = memory_of(target)
        start += _distance(payload.piece.sizes, stored) * block.memory.element_size()
        for offset in range(0, len(memory), _CHUNK):
            yield _Job(descriptor, path, start + offset, memory[offset : offset + _CHUNK])
        return
    # Whole rows of what is stored, of which some columns are wanted.
    row = payload.piece.nbytes // payload.piece.sizes[0]
    rows = max(1, _CHUNK // row)
    for first in range(0, common.sizes[0], rows):
        some = target[first : first + rows]
        columns = tuple(slice(at, at + size) for at, size in zip(stored[1:], common.sizes[1:], strict=True))
        shape = (len(some), *payload.piece.sizes[1:])
        yield _StridedJob(descriptor, path, start + (stored[0] + first) * row, shape, columns, some)


@dataclass(frozen=True)
class _StridedJob:
    descriptor: int
    path: Path
    position: int
    shape: tuple[int, ...]
    columns: tuple[slice, ...]
    target: torch.Tensor

    def run(self) -> None:
        rows = torch.empty(self.shape, dtype=self.target.dtype)
        _Job(self.descriptor, self.path, self.position, memory_of(rows)).run()
        for dimension, columns in enumerate(self.columns, start=1):
            rows = rows.narrow(dimension, columns.start, columns.stop - columns.start)
        self.target.copy_(rows)


def overlap(piece: Piece, block: Block) -> Piece | None:
    """What ``piece`` and ``block`` have in common."""
    offsets, sizes = [], []
    for at, size, begin, length in zip(piece.offsets, piece.sizes, block.offsets, block.memory.shape, strict=True):
        first, end = max(at, begin), min(at + size, begin + length)
        if end <= first:
            return None
        offsets.append(first)
        sizes.append(end - first)
    return Piece(piece.key, tuple(offsets), tuple(sizes), math.prod(sizes) * block.memory.element_size())


def is_one_run(sizes: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a block of the size ``part`` lies in one run of the memory of a contiguous tensor of ``sizes``."""
    split = next((i for i, size in enumerate(part) if size != 1), len(part))
    return all(part[i] == sizes[i] for i in range(split + 1, len(part)))


def _distance(sizes: tuple[int, ...], at: tuple[int, ...]) -> int:
    """How many elements lie before ``at`` in a contiguous tensor of ``sizes``."""
    distance = 0
    for size, index in zip(sizes, at, strict=True):
        distance = distance * size + index
    return distance
