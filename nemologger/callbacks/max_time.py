"""Save and stop before the time of a job is over."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from nemologger import lightning_port
from nemologger.callbacks.stop_at_boundary import StopAtBoundary
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError, SaveFailedError

if TYPE_CHECKING:
    import lightning.pytorch as pl

_FORM = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")
_NUMBER = re.compile(r"-?\d+").fullmatch
_EXPECTED = '"DD:HH:MM:SS" (for example "00:03:45:00"), a timedelta, or a timedelta\'s arguments ({"hours": 3})'


class MaxTimePerRun(IOMixin, StopAtBoundary):
    """Saves and stops a run after some time; the next run resumes, goes on, and has as much time again.

    Lightning's ``Trainer(max_time=...)`` limits the time of all runs together. This is for jobs of limited length that
    follow each other: leave room for the step and validation that are under way then, and for the save. ``fit`` returns as
    usual, but training has not ended: ``on_train_end`` is not called, and :attr:`reached` says so.

    Args:
        duration: ``"DD:HH:MM:SS"``, a timedelta, or a timedelta's arguments, for example ``{"hours": 3}``. The clock starts
            when ``fit`` sets up, before a checkpoint is loaded.
        rank_timeout: How long to wait for the other ranks; None for as long as training itself does (the strategy's
            ``timeout``), but at least 10 minutes. The first rank whose time is over decides.

    Raises:
        ConfigurationError: If ``duration`` is none.

    Attributes:
        reached: Whether the last ``fit`` was stopped.

    Example:
        >>> MaxTimePerRun("00:03:45:00").duration
        datetime.timedelta(seconds=13500)
        >>> MaxTimePerRun({"hours": 3}).reached
        False
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, float],
        rank_timeout: timedelta | None = None,
    ) -> None:
        super().__init__(rank_timeout)
        self.duration = _parsed(duration)
        self.reached = False
        self._end = float("inf")

    @property
    def _reason(self) -> str | None:
        return f"the time of this run ({self.duration}) is over" if time.monotonic() >= self._end else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.reached = False
            self._end = time.monotonic() + self.duration.total_seconds()

    def _leave(self, trainer: pl.Trainer, failed: SaveFailedError | None) -> NoReturn:
        if failed is not None:
            raise failed
        self.reached = True
        lightning_port.leave_fit()


def _parsed(duration: str | timedelta | Mapping[str, float]) -> timedelta:
    """``duration`` as a timedelta."""
    found = _FORM.fullmatch(duration.strip()) if isinstance(duration, str) else None
    try:
        if found is not None:
            days, hours, minutes, seconds = map(int, found.groups())
            duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        elif isinstance(duration, Mapping):
            duration = timedelta(**duration)
    except (TypeError, OverflowError) as error:
        raise ConfigurationError(f"MaxTimePerRun({duration!r}): {error}; expected {_EXPECTED}") from error
    if not isinstance(duration, timedelta):
        # YAML 1.1 takes digits between colons for a number to base 60.
        hint = ". In YAML, quote it: without quotes, 10:00:00:00 is read as a number" if _NUMBER(str(duration)) else ""
        raise ConfigurationError(f"MaxTimePerRun({duration!r}): expected {_EXPECTED}{hint}")
    if duration <= timedelta(0):
        raise ConfigurationError(f"MaxTimePerRun({duration}): expected more than no time")
    return duration
