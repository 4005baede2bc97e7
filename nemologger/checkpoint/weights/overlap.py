"""What parts of a tensor share. Of stored ones that do, which would count is chance, and some of it may be in none."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

#: A part of a tensor: where it begins, and its sizes.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def common(one: Box, other: Box) -> Box | None:
    """What two parts of a tensor have in common; None if nothing.

    Example:
        >>> common(((0, 0), (2, 6)), ((1, 0), (2, 3)))
        ((1, 0), (1, 3))
    """
    offsets, sizes = [], []
    for at, size, begin, length in zip(*one, *other, strict=True):
        first, end = max(at, begin), min(at + size, begin + length)
        if end <= first:
            return None
        offsets.append(first)
        sizes.append(end - first)
    return tuple(offsets), tuple(sizes)


def overlap(parts: Iterable[Box]) -> bool:
    """Whether any two of ``parts`` that are not the same share elements.

    Example:
        >>> overlap([((0, 0), (2, 6)), ((2, 0), (1, 6))]), overlap([((0, 0), (2, 6)), ((1, 0), (2, 6))])
        (False, True)
    """
    boxes = {(offsets, sizes) for offsets, sizes in parts if 0 not in sizes}
    if len(boxes) < 2:
        return False
    dimensions = range(len(next(iter(boxes))[0]))
    if all(_apart({(offsets[i], sizes[i]) for offsets, sizes in boxes}) for i in dimensions):
        return False  # a grid, as nearly always
    # Along the one that tells most of them apart, few are begun and not ended at any place.
    along = max(dimensions, key=lambda dimension: len({offsets[dimension] for offsets, _ in boxes}))
    begun: list[Box] = []
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][along]):
        begun = [box for box in begun if box[0][along] + box[1][along] > offsets[along]]
        for others, lengths in begun:
            if all(max(o, p) < min(o + n, p + m) for o, n, p, m in zip(offsets, sizes, others, lengths, strict=True)):
                return True
        begun.append((offsets, sizes))
    return False


def _apart(intervals: set[tuple[int, int]]) -> bool:
    ordered = sorted(intervals)
    return all(start + size <= after for (start, size), (after, _) in pairwise(ordered))
