"""How far a save is that somebody waits for."""

from __future__ import annotations

import logging
import time

from nemologger.checkpoint.writing.in_flight import InFlight

log = logging.getLogger(__name__)

#: Seconds between two lines in the log.
EVERY = 10.0


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

    def tell(self) -> None:
        """Call it often."""
        now = time.monotonic()
        if now < self._told + EVERY:
            return
        self._told = now
        written, size = self._save.written, self._save.size
        log.log(
            logging.WARNING if self._hint else logging.INFO,
            "checkpoint %s: %.0f of %.0f MB written%s",
            self._save.checkpoint,
            written / 1e6,
            size / 1e6,
            self._hint,
        )
