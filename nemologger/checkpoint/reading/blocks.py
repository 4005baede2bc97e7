"""The blocks of a file, read into the pieces of memory that they belong to, and compared with their checksums on the way.

What has just been read lies in the cache of the processor: its checksum costs a fraction of what a second pass would.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from nemologger.checkpoint.manifest import BLOCK, FileRecord
from nemologger.errors import DamagedCheckpointError
from nemologger.stores.path import is_unknown

_STEP = 512 << 10  # fits into the cache of one core
_MOST_BUFFERS = 512  # the kernel takes 1024 at once


@dataclass(frozen=True)
class Part:
    """Bytes of a file from ``start`` on that have a place in memory."""

    start: int
    target: memoryview

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + len(self.target)


@dataclass(frozen=True)
class CheckedFile:
    """A file that is read block by block; blocks may be read in parallel.

    Attributes:
        path: For messages.
        parts: What has a place in memory, by position, without overlaps. The rest is only looked at.
        record: What was written.
    """

    path: Path
    parts: Sequence[Part]
    record: FileRecord

    def read(self, descriptor: int, number: int) -> None:
        """Read block ``number`` from a ``descriptor`` of the file.

        Raises:
            DamagedCheckpointError: If it is not as it was written, or ends too early.
        """
        start, end = number * BLOCK, min((number + 1) * BLOCK, self.record.size)
        hasher = xxhash.xxh3_64()
        position = start
        for buffers in _steps(self._pieces(start, end)):
            for buffer in self._fill(descriptor, buffers, position):
                hasher.update(buffer)
                position += len(buffer)
        if hasher.hexdigest() != self.record.blocks[number]:
            raise DamagedCheckpointError(
                f"{self.path}: its bytes {start} to {end - 1} have changed since they were written"
            )

    def _pieces(self, start: int, end: int) -> Iterator[memoryview | int]:
        """Where the bytes from ``start`` to ``end`` go, one after the other; a number for so many that go nowhere."""
        index = max(0, bisect_right(self.parts, start, key=lambda part: part.start) - 1)
        while start < end:
            while index < len(self.parts) and self.parts[index].end <= start:
                index += 1
            part = self.parts[index] if index < len(self.parts) else None
            if part is not None and part.start <= start:
                piece = part.target[start - part.start : end - part.start]
                yield piece
                start += len(piece)
            else:
                until = end if part is None else min(part.start, end)
                yield until - start
                start = until

    def _fill(self, descriptor: int, buffers: list[memoryview], position: int) -> list[memoryview]:
        """``buffers``, filled from ``position`` on."""
        left = buffers
        while left:
            with reading(self.path):
                count = os.preadv(descriptor, left, position)
            if count == 0:
                raise DamagedCheckpointError(f"{self.path} ends at byte {position}, {self.record.size} were written")
            position += count
            while left and count >= len(left[0]):
                count -= len(left[0])
                left = left[1:]
            if left and count:
                left = [left[0][count:], *left[1:]]
        return buffers


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the file system says while ``path`` is read is damage of it, unless it is of something else."""
    try:
        yield
    except OSError as error:
        if is_unknown(path, error):
            raise
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _steps(pieces: Iterator[memoryview | int]) -> Iterator[list[memoryview]]:
    """``pieces`` in groups of at most so many bytes and buffers, with memory for what goes nowhere."""
    scratch: memoryview | None = None
    group: list[memoryview] = []
    used = 0
    for piece in pieces:
        left = piece if isinstance(piece, int) else len(piece)
        done = 0
        while left:
            if used == _STEP or len(group) == _MOST_BUFFERS:
                yield group
                group, used = [], 0
            taken = min(left, _STEP - used)
            if isinstance(piece, int):
                scratch = memoryview(bytearray(_STEP)) if scratch is None else scratch
                group.append(scratch[used : used + taken])
            else:
                group.append(piece[done : done + taken])
            done, left, used = done + taken, left - taken, used + taken
    if group:
        yield group
