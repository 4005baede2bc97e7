"""Whether any rank wants something, asked at every training step."""

from __future__ import annotations

import time

from nemologger.ranks.group import Ranks


class Poll:
    """Asks all ranks, again and again, whether one of them wants something; cheap enough for every training step.

    All ranks call it at the same points and get the same answer. With one process the answer is its own wish. With
    several, they exchange a few bytes in at most every call; where calls follow each other faster than ``seconds``, only in
    some of them, which the ranks settle from the time that the slowest of them took since the last exchange.

    Args:
        ranks: The processes.
        seconds: How long an answer may be old.

    Example:
        >>> from nemologger.ranks import SingleProcess
        >>> poll = Poll(SingleProcess())
        >>> poll(False), poll(True)
        (False, True)
    """

    MOST = 16  # calls in a row without an exchange: when steps suddenly take longer, so many of them pass unasked

    def __init__(self, ranks: Ranks, seconds: float = 0.1) -> None:
        self._ranks = ranks
        self._seconds = seconds
        self._calls = 0
        self._next = 1
        self._asked = time.monotonic()

    def __call__(self, wish: bool, *, now: bool = False) -> bool:
        """Whether any rank wants it, as far as is known. Collective.

        Args:
            wish: Whether this one does.
            now: Ask in this call. The same on all ranks.
        """
        if self._ranks.world_size == 1:
            return wish
        self._calls += 1
        if self._calls < self._next and not now:
            return False
        elapsed = (time.monotonic() - self._asked) / self._calls
        wanted, slowest = self._ranks.largest([float(wish), elapsed])
        self._next = max(1, min(self.MOST, int(self._seconds / max(slowest, 1e-9))))
        self._calls, self._asked = 0, time.monotonic()
        return wanted > 0
