"""Whether parts of a tensor share elements: which of them would count is chance, and others may be in no part."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

Part = tuple[tuple[int, ...], tuple[int, ...]]


def overlap(parts: Iterable[Part]) -> bool:
    """Whether any two of ``parts``, offsets and sizes, do that are not the same.

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
    begun: list[Part] = []
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
