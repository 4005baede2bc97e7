"""Tensors straight from their files into their own memory, in parallel; no second copy, and nothing is unpickled.

That works for what :mod:`~nemologger.checkpoint.write` wrote, in whole pieces. Anything else (files of NeMo, of torch
itself) goes the ordinary way of torch's distributed checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nemologger.checkpoint.blocks import CheckedFile, Part
from nemologger.checkpoint.manifest import FileRecord
from nemologger.checkpoint.stage import memory_of
from nemologger.checkpoint.weights import Payload, described, payloads, read_ordinary
from nemologger.errors import DamagedCheckpointError

_CHUNK = 16 << 20
_THREADS = 4


def read_tensors(
    weights: Path,
    wanted: Callable[[str], bool] = lambda key: True,
    records: Mapping[str, FileRecord] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` under their flat keys, on the CPU.

    Args:
        weights: The directory.
        wanted: Which keys to read; default all.
        records: Files of ``weights`` that are to be read as a whole and compared with their checksums on the way.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing, cannot be read, or is not as it was written.
    """
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in described(weights).items() if wanted(key)}
    with ExitStack() as files, ThreadPoolExecutor(_THREADS, thread_name_prefix="nemologger-read") as pool:
        opened = _Files(weights, files)
        # A header that is not as expected was written by another torch, or by chance has the same length.
        known = {
            key: group
            for key, group in payloads(weights, tensors).items()
            if all(opened.has_header(payload) for payload in group)
        }
        ordinary = {key: tensor for key, tensor in tensors.items() if key not in known}
        if ordinary:
            read_ordinary(weights, ordinary)
        jobs = [
            job for key, group in known.items() for payload in group for job in _jobs(opened, payload, tensors[key])
        ]
        for _ in pool.map(lambda run: run(), list(_runs(opened, jobs, records or {}))):
            pass
    return tensors


def _runs(files: _Files, jobs: list[_Job], records: Mapping[str, FileRecord]) -> Iterator[Callable[[], None]]:
    """What there is to do, in the order of the files: whole blocks of those that have a record, else only what is wanted."""
    jobs = sorted(jobs, key=lambda job: (job.path, job.position))
    for name, record in sorted(records.items()):
        parts: list[Part] = []
        for job in jobs:
            if job.path.name == name:
                part = Part(job.position, job.target)
                if part.end <= record.size and (not parts or parts[-1].end <= part.start):
                    parts.append(part)
                else:
                    yield job.run  # nothing of ours: read by itself
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


def _jobs(files: _Files, payload: Payload, tensor: torch.Tensor) -> Iterator[_Job]:
    memory = memory_of(tensor, payload.piece)
    start = payload.header_start + len(payload.header)
    for offset in range(0, len(memory), _CHUNK):
        chunk = memory[offset : offset + _CHUNK]
        yield _Job(files.descriptor(payload.file), files.path(payload.file), start + offset, chunk)
