"""Tensors from a store into their own memory: whole blocks side by side, each checked against the manifest as it comes.

A request costs a store more than the bytes it brings, so what is fetched is not tensors but the blocks they lie in, those
that the manifest has checksums of. Headers are looked at on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Protocol, cast

import torch
import xxhash

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.manifest import BLOCK, FileRecord
from nemologger.checkpoint.reading.overlaps import Block, Rows, Run, to_read
from nemologger.checkpoint.state.stage import memory_of
from nemologger.checkpoint.weights import Payload
from nemologger.disk.there import exists
from nemologger.errors import DamagedCheckpointError
from nemologger.stores.path import StorePath, is_unknown

_AT_ONCE = 8


class _Wanted(Protocol):
    """Bytes of a file from ``start`` to before ``end`` that have something to do with the tensor ``key``."""

    key: str
    start: int
    end: int

    def take(self, at: int, data: memoryview) -> bool:
        """Get some of them, ``at`` bytes behind the first; whether they are as expected."""


def fetch(
    weights: StorePath,
    known: Mapping[str, Sequence[Payload]],
    blocks: Mapping[str, Block],
    records: Mapping[str, FileRecord],
) -> set[str]:
    """Fill ``blocks`` from the places that are ``known``.

    Args:
        weights: The directory.
        known: Where the tensors lie.
        blocks: What is wanted of them.
        records: Files of ``weights`` that are to be fetched as a whole.

    Returns:
        The keys whose headers were not as expected: what is in those tensors now means nothing.

    Raises:
        DamagedCheckpointError: If a file is missing, too short, or not as it was written.
    """
    weights = weights.resolve()
    recorded = {**_records(weights), **records}
    asked: dict[tuple[str, int], list[_Wanted]] = {
        (file, number): [] for file, record in records.items() for number in range(len(record.blocks))
    }
    for key, group in known.items():
        for payload in group:
            for wanted in _wanted(payload, blocks[key]):
                for number in range(wanted.start // BLOCK, -(-wanted.end // BLOCK)):
                    asked.setdefault((payload.file, number), []).append(wanted)

    def one(block: tuple[tuple[str, int], list[_Wanted]]) -> set[str]:
        (file, number), wanted = block
        return _fetch(weights / file, number, wanted, recorded.get(file))

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nemologger-fetch") as pool:
        return {key for strange in pool.map(one, sorted(asked.items(), key=lambda b: b[0])) for key in strange}


def _fetch(path: StorePath, number: int, wanted: list[_Wanted], record: FileRecord | None) -> set[str]:
    """Fetch a block, hand out what is wanted of it, and say whose header is not as expected."""
    start = number * BLOCK
    try:
        block = memoryview(path.store.read(str(path), start, start + BLOCK))
    except OSError as error:
        if is_unknown(cast(Path, path), error):
            raise
        raise DamagedCheckpointError(f"{path} cannot be read from byte {start} on: {error.strerror}") from error
    expected = record.blocks[number] if record is not None and number < len(record.blocks) else None
    if expected is not None and xxhash.xxh3_64_hexdigest(block) != expected:
        raise DamagedCheckpointError(
            f"{path}: its bytes {start} to {start + len(block) - 1} have changed since they were written"
        )
    strange = set()
    for one in wanted:
        first, last = max(one.start, start), min(one.end, start + BLOCK)
        found = block[first - start : last - start]
        if len(found) != last - first:
            raise DamagedCheckpointError(f"{path} ends at byte {start + len(block)}, in the middle of {one.key}")
        if not one.take(first - one.start, found):
            strange.add(one.key)
    return strange


def _wanted(payload: Payload, block: Block) -> list[_Wanted]:
    """What is wanted of ``payload``: its header too, if anything is."""
    key = payload.key
    parts = [
        _IntoMemory(key, one) if isinstance(one, Run) else _IntoColumns(key, one) for one in to_read(payload, block)
    ]
    return [_Header(key, payload), *parts] if parts else []


class _Header:
    """Is to be what it should be: another torch wrote it otherwise, or by chance it has the same length."""

    def __init__(self, key: str, payload: Payload) -> None:
        self.key = key
        self.start = payload.header_start
        self.end = self.start + len(payload.header)
        self._expected = payload.header

    def take(self, at: int, data: memoryview) -> bool:
        return data == self._expected[at : at + len(data)]


class _IntoMemory:
    def __init__(self, key: str, run: Run) -> None:
        self.key = key
        self.start = run.start
        self.end = run.start + run.size
        self._target = run.target

    def take(self, at: int, data: memoryview) -> bool:
        self._target[at : at + len(data)] = data
        return True


class _IntoColumns:
    """Rows wait in memory of their own until all of them are there; blocks come in parallel."""

    def __init__(self, key: str, rows: Rows) -> None:
        self.key = key
        self.start = rows.start
        self.end = rows.start + rows.size
        self._rows = rows
        self._missing = rows.size
        self._lock = Lock()
        self._buffer: torch.Tensor | None = None

    def take(self, at: int, data: memoryview) -> bool:
        with self._lock:
            if self._buffer is None:
                self._buffer = self._rows.empty()
            buffer = self._buffer
        memory_of(buffer)[at : at + len(data)] = data
        with self._lock:
            self._missing -= len(data)
            complete = not self._missing
        if complete:
            self._rows.place(buffer)
            self._buffer = None
        return True


def _records(weights: StorePath) -> dict[str, FileRecord]:
    """What the manifest says of the files; nothing if there is none, because another tool wrote them."""
    checkpoint = weights.parent
    if not exists(checkpoint / names.MANIFEST):
        return {}
    files = manifests.read(cast(Path, checkpoint)).files
    return {
        PurePosixPath(file).name: record
        for file, record in files.items()
        if PurePosixPath(file).parent == PurePosixPath(weights.name)
    }
