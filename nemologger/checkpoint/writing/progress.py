"""What training waits for is said: what it is, since when, and how far it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nemologger.checkpoint.writing.in_flight import InFlight

log = logging.getLogger(__name__)

#: Seconds between two lines in the log.
EVERY = 10.0


def wait_aloud(is_over: Callable[[float], bool], what: str) -> None:
    """Wait for what only the disk can end, and say so now and then.

    Args:
        is_over: Waits so many seconds at most, and says whether it is over.
        what: What is waited for.
    """
    began = time.monotonic()
    while not is_over(EVERY):
        log.warning("training waits for %s: %.0f s by now", what, time.monotonic() - began)


class Progress:
    """Says now and then how far a save is.

    Args:
        save: The save. It is waited for from now on.
        hint: What whoever waits can do.
    """

    def __init__(self, save: InFlight, hint: str = "") -> None:
        self._save = save
        self._hint = hint
        self._told = time.monotonic()
        log.info("waiting for checkpoint %s to be written", save.checkpoint)

    def tell(self, still: float = 0.0) -> None:
        """Call it often.

        Args:
            still: For so many seconds nothing has moved.
        """
        now = time.monotonic()
        if now < self._told + EVERY:
            return
        self._told = now
        written, size = self._save.written, self._save.size
        hint = f"; training waits, and nothing has moved for {still:.0f} s" if still > EVERY else self._hint
        log.log(
            logging.WARNING if hint else logging.INFO,
            "checkpoint %s: %.0f of %.0f MB written%s",
            self._save.checkpoint,
            written / 1e6,
            size / 1e6,
            hint,
        )
