"""How long a rank may be silent: given, or learned from how long it was silent and well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemologger.watch.board import Section

# How often a section must have been seen before its timeout is learned. The rest of a run is not: it happens once.
_ENOUGH = {Section.STEP: 32, Section.EPOCH: 3, Section.VALIDATION: 3, Section.CHECKPOINT: 3}


class Patience:
    """Timeouts of the sections of a run.

    Training steps have ``steady`` seconds, all else ``initial``. What has been seen often enough has ``factor`` times the
    longest that was seen instead, but not less than ``floor``. Saving never has less than ``initial``: how long disks and
    stores usually take says little about how long they may be stuck. Each restart of a group of ranks doubles what was
    learned, up to what was given: should it have been too short, the restarted run gets past the place.

    Args:
        initial: Seconds; None for no limit.
        steady: Seconds; None for no limit.
        learn: Whether to learn.
        factor: Safety factor.
        floor: Seconds.
        restarts: How often the group was restarted.

    Example:
        >>> patience = Patience(3600.0, 2700.0, learn=True, factor=5.0, floor=60.0)
        >>> for _ in range(32):
        ...     _ = patience.saw(Section.STEP, 20.0)
        >>> patience.timeout(Section.STEP), patience.timeout(Section.VALIDATION)
        (100.0, 3600.0)
    """

    def __init__(
        self,
        initial: float | None,
        steady: float | None,
        *,
        learn: bool,
        factor: float,
        floor: float,
        restarts: int = 0,
    ) -> None:
        self._given = {section: _limit(steady if section is Section.STEP else initial) for section in Section}
        self._learn = learn
        self._factor = factor
        self._floor = floor
        self._restarts = restarts
        self._longest = dict.fromkeys(_ENOUGH, 0.0)
        self._seen = dict.fromkeys(_ENOUGH, 0)

    def saw(self, section: Section, seconds: float) -> bool:
        """The rank was silent for ``seconds`` in ``section``, and well. Returns whether a timeout has changed."""
        seen = self._seen.get(section)
        if seen is None or not self._learn:
            return False
        self._seen[section] = seen + 1
        if seconds > self._longest[section]:
            self._longest[section] = seconds
            return seen + 1 >= _ENOUGH[section]
        return seen + 1 == _ENOUGH[section]

    def timeout(self, section: Section) -> float:
        """Seconds of silence in ``section`` after which a rank counts as hung."""
        given = self._given[section]
        if not self._learn or self._seen.get(section, 0) < _ENOUGH.get(section, 1):
            return given
        floor = given if section is Section.CHECKPOINT else self._floor
        learned = max(self._longest[section] * self._factor, floor)
        return min(learned * 2.0**self._restarts, max(learned, given))

    def timeouts(self) -> list[float]:
        """Of all sections, in their order."""
        return [self.timeout(section) for section in Section]

    def to_plain(self) -> dict[str, Any]:
        """What was learned, for a checkpoint."""
        return {
            section.name.lower(): {"longest": self._longest[section], "seen": self._seen[section]}
            for section in _ENOUGH
        }

    def add_plain(self, plain: Mapping[str, Any]) -> None:
        """Take over what an earlier life of the run has learned."""
        for section in _ENOUGH:
            earlier = plain.get(section.name.lower())
            if earlier is not None and self._learn:
                self._longest[section] = max(self._longest[section], float(earlier["longest"]))
                self._seen[section] += int(earlier["seen"])


def _limit(seconds: float | None) -> float:
    return math.inf if seconds is None else float(seconds)
