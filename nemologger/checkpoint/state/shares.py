"""Who writes what: tensors that several ranks hold, shared out among them. Pure decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """The size of a tensor, and the bytes of one element."""

    sizes: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.sizes) * self.itemsize


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, contiguous in the memory of the rank that writes it.

    Attributes:
        key: The tensor's flat key.
        offsets: Where the part begins, per dimension.
        sizes: How far it reaches, per dimension.
        nbytes: Its bytes.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor.

    Attributes:
        shape: Of the part.
        offsets: Where it begins in the whole.
        holders: The ranks that hold the same part, in order; None if they all do.
    """

    shape: Shape
    offsets: tuple[int, ...]
    holders: tuple[int, ...] | None = None


def share_of(
    rank: int, world_size: int, parts: Mapping[str, Part], rank_zero: frozenset[str], reserved: int | None = None
) -> list[Piece]:
    """What ``rank`` is to write of the parts that it holds.

    Ranks that hold the same parts share them out among themselves, without asking each other.

    Args:
        rank: This rank.
        world_size: The number of ranks.
        parts: Every tensor, in an order that all ranks share.
        rank_zero: Tensors that only rank 0 may write.
        reserved: Their bytes there; see :func:`share_out`.
    """
    groups: dict[tuple[int, ...] | None, dict[str, Shape]] = {}
    for key, part in parts.items():
        groups.setdefault(part.holders, {})[key] = part.shape
    pieces: list[Piece] = []
    for holders, shapes in groups.items():
        if holders is None:
            pieces += share_out(shapes, rank_zero, world_size, reserved)[rank]
        elif rank in holders:
            held = {key: shape for key, shape in shapes.items() if shape.nbytes}
            for piece in share_out(held, frozenset(), len(holders))[holders.index(rank)]:
                offsets = tuple(a + b for a, b in zip(piece.offsets, parts[piece.key].offsets, strict=True))
                pieces.append(replace(piece, offsets=offsets))
    return pieces


def share_out(
    shapes: Mapping[str, Shape], rank_zero: frozenset[str], world_size: int, reserved: int | None = None
) -> list[list[Piece]]:
    """Give every rank its pieces of tensors that all hold: every byte once, about as many bytes for each rank.

    All tensors are laid on one line, which is cut into ``world_size`` equal parts; a tensor across a cut is split at the
    nearest row. At most ``world_size - 1`` tensors are split, and what a rank writes is the same in every save.

    Args:
        shapes: Every tensor, in an order that all ranks share.
        rank_zero: Tensors that only rank 0 may write. They count toward its part.
        world_size: The number of ranks.
        reserved: The bytes of ``rank_zero`` on rank 0; default as they are here. Another rank may have others there, and
            knows only its own part then.

    Returns:
        For each rank, its pieces.
    """
    shares: list[list[Piece]] = [[] for _ in range(world_size)]
    for key in shapes:
        if key in rank_zero:
            shares[0].append(_whole(key, shapes[key]))
    line = sum(piece.nbytes for piece in shares[0]) if reserved is None else reserved
    total = line + sum(shape.nbytes for key, shape in shapes.items() if key not in rank_zero)
    part = total / world_size or 1.0
    for key, shape in shapes.items():
        if key in rank_zero:
            continue
        for rank, piece in _cut(key, shape, line, part, world_size):
            shares[rank].append(piece)
        line += shape.nbytes
    return shares


def into_files(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """Spread one rank's pieces over at most ``count`` files of about equal bytes; no file is empty."""
    files: list[list[Piece]] = [[] for _ in range(count)]
    sizes = [0] * count
    for piece in sorted(pieces, key=lambda piece: -piece.nbytes):
        smallest = sizes.index(min(sizes))
        files[smallest].append(piece)
        sizes[smallest] += piece.nbytes
    return [file for file in files if file]


def _whole(key: str, shape: Shape) -> Piece:
    return Piece(key, (0,) * len(shape.sizes), shape.sizes, shape.nbytes)


def _cut(key: str, shape: Shape, start: int, part: float, world_size: int) -> list[tuple[int, Piece]]:
    """The pieces of one tensor that begins at byte ``start`` of the line."""
    # Only the first dimension longer than one can be split without leaving gaps in memory.
    dimension = next((i for i, size in enumerate(shape.sizes) if size > 1), None)
    first = min(int(start / part), world_size - 1)
    if dimension is None or not shape.nbytes or start + shape.nbytes <= (first + 1) * part:
        return [(first, _whole(key, shape))]
    rows = shape.sizes[dimension]
    row = shape.nbytes // rows
    pieces = []
    begin = 0
    for rank in range(first, world_size):
        end = rows if rank == world_size - 1 else min(rows, max(begin, round(((rank + 1) * part - start) / row)))
        if end > begin:
            offsets, sizes = [0] * len(shape.sizes), list(shape.sizes)
            offsets[dimension], sizes[dimension] = begin, end - begin
            pieces.append((rank, Piece(key, tuple(offsets), tuple(sizes), (end - begin) * row)))
        begin = end
        if begin == rows:
            break
    return pieces
