"""The memory that a rank and its monitor share: the rank writes how it is, the monitor reads."""

from __future__ import annotations

import enum
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass


class Section(enum.IntEnum):
    """What a rank was doing when it last gave a sign of life."""

    START = 0
    STEP = 1
    EPOCH = 2
    VALIDATION = 3
    CHECKPOINT = 4
    END = 5

    @property
    def words(self) -> str:
        """For a message."""
        return _WORDS[self]


_WORDS = {
    Section.START: "starting (setup, restoring, first steps)",
    Section.STEP: "training",
    Section.EPOCH: "going from one epoch to the next",
    Section.VALIDATION: "validation",
    Section.CHECKPOINT: "saving a checkpoint",
    Section.END: "ending",
}

_SIGN = struct.Struct("=QQBB")  # signs of life so far, step, section, waiting for other ranks
_TIMEOUTS_AT = 64
_TIMEOUTS = struct.Struct(f"={len(Section)}d")


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        count: How many there were, this one included.
        step: The global step.
        section: What the rank has begun with it.
        waiting: Whether it waits for other ranks from there on.
    """

    count: int
    step: int
    section: Section
    waiting: bool


class Board:
    """The memory. One writes, one reads; the reader cares for change only, so that it needs no lock.

    Args:
        descriptor: Of the memory of another process; a new one if it is None.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
            os.ftruncate(descriptor, mmap.PAGESIZE)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._count = 0

    def give_sign(self, step: int, section: Section, *, waiting: bool = False) -> None:
        """I am alive."""
        self._count += 1
        _SIGN.pack_into(self._map, 0, self._count, step, section, waiting)

    def last_sign(self) -> Sign:
        """The newest sign of life."""
        count, step, section, waiting = _SIGN.unpack_from(self._map, 0)
        return Sign(count, step, Section(section), bool(waiting))

    def set_timeouts(self, seconds: list[float]) -> None:
        """How long the rank may be silent in each section, in their order."""
        _TIMEOUTS.pack_into(self._map, _TIMEOUTS_AT, *seconds)

    def timeout(self, section: Section) -> float:
        """How long the rank may be silent in ``section``."""
        return float(_TIMEOUTS.unpack_from(self._map, _TIMEOUTS_AT)[section])

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
        os.close(self.descriptor)
