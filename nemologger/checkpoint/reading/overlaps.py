"""What a stored piece of a tensor and the part that is wanted have in common, as bytes of a file. Pure decisions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemologger.checkpoint.state.shards import part_of
from nemologger.checkpoint.state.shares import Piece
from nemologger.checkpoint.state.stage import memory_of
from nemologger.checkpoint.weights import Box, Payload, common

_CHUNK = 16 << 20


@dataclass(frozen=True)
class Block:
    """A part of a tensor to read: ``memory`` on the CPU, contiguous, and where it begins in the whole."""

    memory: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Where in the whole it begins, and its sizes."""
        return self.offsets, tuple(self.memory.shape)


@dataclass(frozen=True)
class Run:
    """Bytes of ``file`` from ``start`` on that go into one run of memory."""

    file: str
    start: int
    target: memoryview

    @property
    def size(self) -> int:
        """How many."""
        return len(self.target)


@dataclass(frozen=True)
class Rows:
    """Whole rows in ``file`` from byte ``start`` on, of which some columns are wanted.

    Attributes:
        shape: Of the rows, as a tensor.
        columns: Which of them, for each dimension but the first.
        target: Where these go.
    """

    file: str
    start: int
    shape: tuple[int, ...]
    columns: tuple[slice, ...]
    target: torch.Tensor

    @property
    def size(self) -> int:
        """Their bytes."""
        return math.prod(self.shape) * self.target.element_size()

    def empty(self) -> torch.Tensor:
        """A tensor to read the rows into."""
        return torch.empty(self.shape, dtype=self.target.dtype)

    def place(self, rows: torch.Tensor) -> None:
        """Copy what is wanted of ``rows``."""
        for dimension, columns in enumerate(self.columns, start=1):
            rows = rows.narrow(dimension, columns.start, columns.stop - columns.start)
        self.target.copy_(rows)


def to_read(payload: Payload, block: Block) -> Iterator[Run | Rows]:
    """What to read of ``payload`` for ``block``: what both have in common, in the order of the file."""
    start = payload.header_start + len(payload.header)
    if payload.piece.sizes == block.memory.shape and payload.piece.offsets == block.offsets:
        yield from _runs(
            payload.file, start, memory_of(block.memory)
        )  # as it nearly always is, of very many small ones
        return
    shared = overlap(payload.piece, block)
    if shared is None:
        return
    stored = tuple(shared.offsets[i] - payload.piece.offsets[i] for i in range(len(shared.sizes)))
    target = part_of(block.memory, shared, block.offsets)
    if is_one_run(payload.piece.sizes, shared.sizes) and is_one_run(tuple(block.memory.shape), shared.sizes):
        start += _distance(payload.piece.sizes, stored) * block.memory.element_size()
        yield from _runs(payload.file, start, memory_of(target))
        return
    row = payload.piece.nbytes // payload.piece.sizes[0]
    rows = max(1, _CHUNK // row)
    for first in range(0, shared.sizes[0], rows):
        some = target[first : first + rows]
        columns = tuple(slice(at, at + size) for at, size in zip(stored[1:], shared.sizes[1:], strict=True))
        shape = (len(some), *payload.piece.sizes[1:])
        yield Rows(payload.file, start + (stored[0] + first) * row, shape, columns, some)


def _runs(file: str, start: int, memory: memoryview) -> Iterator[Run]:
    for offset in range(0, len(memory), _CHUNK):
        yield Run(file, start + offset, memory[offset : offset + _CHUNK])


def overlap(piece: Piece, block: Block) -> Piece | None:
    """What ``piece`` and ``block`` have in common."""
    shared = common((piece.offsets, piece.sizes), block.box)
    return None if shared is None else Piece(piece.key, *shared, math.prod(shared[1]) * block.memory.element_size())


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
