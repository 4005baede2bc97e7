"""Tensors straight from their files into their own memory, in parallel; no second copy, and nothing is unpickled.

That works for what :mod:`~nemologger.checkpoint.write` wrote, in whole pieces. Anything else (files of NeMo, of torch
itself) goes the ordinary way of torch's distributed checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from nemologger.checkpoint.fetch import fetch
from nemologger.checkpoint.stage import memory_of
from nemologger.checkpoint.weights import Payload, described, payloads, read_ordinary
from nemologger.errors import DamagedCheckpointError
from nemologger.store_path import in_store

_CHUNK = 16 << 20
_THREADS = 4


def read_tensors(weights: Path, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, torch.Tensor]:
    """The tensors of ``weights`` under their flat keys, on the CPU.

    Args:
        weights: The directory.
        wanted: Which keys to read; default all.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing or cannot be read.
    """
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in described(weights).items() if wanted(key)}
    remote = in_store(weights)
    if remote is not None:
        found = payloads(weights, tensors)
        strange = fetch(remote, found, tensors)
        if rest := {key: tensor for key, tensor in tensors.items() if key in strange or key not in found}:
            read_ordinary(weights, rest)
        return tensors
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
        for _ in pool.map(_Job.run, sorted(jobs, key=lambda job: (job.path, job.position))):
            pass
    return tensors


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
