"""What a tracker is told, while it may be slow, broken or gone: training neither ends nor waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

log = logging.getLogger(__name__)

#: Seconds that training waits for one call.
PATIENCE = 10.0
#: Seconds until a tracker that failed is tried again, for the first time and at most; they double in between.
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 600.0
#: How many calls wait in memory.
MOST = 10_000

_TRIES = 3
_IDLE = 5.0


@dataclass(eq=False)
class _Call:
    what: str
    make: Callable[[], None]
    patience: float
    failures: int = 0
    begun: float | None = None


class Outbox:
    """The calls that a tracker has yet to make, in order.

    A tracker that answers is waited for. When a call fails or takes too long, that is said once, and from then on training
    does not wait: what comes waits in memory, and the tracker is tried again after a while. A call that has failed several
    times is given up, since the tracker may never take it. When nothing waits any more, all is as it was before.

    Args:
        tracker: Its name, for the log.
        beside: Make the calls in a thread. Without one, for local files: a call that hangs is waited for.

    Example:
        >>> outbox = Outbox("MyTracker")
        >>> outbox.put("metrics of step 0", lambda: None)
        >>> outbox.finish(5.0)
    """

    def __init__(self, tracker: str, *, beside: bool = True) -> None:
        self._tracker, self._beside = tracker, beside
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._thread: threading.Thread | None = None
        self._is_behind = self._is_ending = False
        self._pause, self._next_try = 0.0, 0.0
        self._failures = 0  # in a row, while it is ending
        self._lost: list[str] = []

    def __reduce__(self) -> Any:
        return partial(Outbox, self._tracker, beside=self._beside), ()  # of a copy, nothing waits yet

    def put(
        self, what: str, make: Callable[[], None], *, patience: float | None = None, repeatable: bool = False
    ) -> None:
        """Make a call, now if possible.

        Args:
            what: What it is, for the log.
            make: The call. An exception means that the tracker has failed.
            patience: How many seconds to wait for it; default :data:`PATIENCE`.
            repeatable: The same will be put again soon: it need not wait if it cannot be made now.
        """
        call = _Call(what, make, PATIENCE if patience is None else patience)
        with self._changed:
            if repeatable and (self._calls or time.monotonic() < self._next_try):
                return
            if len(self._calls) >= MOST:
                self._lost.append(self._calls.popleft().what)
                if len(self._lost) == 1:
                    log.error("%s: more than %d calls wait for it. The oldest are lost.", self._tracker, MOST)
            self._calls.append(call)
            if self._beside:
                self._wake()
                if not self._is_behind and not self._has_gone(call, call.patience):
                    self._fall_behind(f"has not answered for {call.patience:.0f} s ({what})")
                return
        self._work()
        if repeatable:
            with self._changed:
                self._drop(call)

    def finish(self, patience: float | None = None) -> None:
        """Make the calls that wait, without pauses, and give up those that fail.

        Args:
            patience: How many seconds to wait for all of them. Default: as long as each is made in its own time; not
                much longer than for one call if the tracker does not answer already.
        """
        with self._changed:
            if patience is None and self._is_behind:
                patience = 3 * PATIENCE
            end = None if patience is None else time.monotonic() + patience
            self._is_ending, self._failures = True, 0
            if self._beside:
                self._wake()
                while self._calls and self._has_gone(self._calls[0], max(PATIENCE, self._calls[0].patience), end):
                    pass
        if not self._beside:
            self._work()
        with self._changed:
            # A thread that does not come back is left to itself: it finds that it is no longer the one.
            self._thread = None
            self._changed.notify_all()
            self._lost += [call.what for call in self._calls]
            self._calls.clear()
            self._end_outage("is left")
            self._is_ending, self._pause, self._next_try = False, 0.0, 0.0

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="nemologger-tracker", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _has_gone(self, call: _Call, patience: float, end: float | None = None) -> bool:
        """Wait until ``call`` waits no more, made or not, or the tracker has failed; False if that takes too long."""
        asked = time.monotonic()
        while call in self._calls:
            if self._is_behind and not self._is_ending:
                return True  # said already
            limit = max(asked, call.begun or 0.0) + patience
            left = (limit if end is None else min(limit, end)) - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(min(left, 3600.0))
        return True

    def _work(self) -> None:
        while (call := self._next()) is not None:
            try:
                call.make()
            except Exception as error:  # noqa: BLE001  whatever it is, it is no reason to stop training
                self._fail(call, error)
            else:
                self._succeed(call)

    def _next(self) -> _Call | None:
        """The call to make now. Waits for one in the thread; None if there is none, or the thread is to end."""
        with self._changed:
            while not self._beside or self._thread is threading.current_thread():
                pause = 0.0 if self._is_ending else self._next_try - time.monotonic()
                if self._calls and pause <= 0:
                    self._calls[0].begun = time.monotonic()
                    return self._calls[0]
                if not self._beside:
                    return None
                if not self._changed.wait(pause if self._calls else _IDLE) and not self._calls:
                    self._thread = None  # the next call begins another
            return None

    def _succeed(self, call: _Call) -> None:
        with self._changed:
            self._drop(call)
            self._failures, self._pause, self._next_try = 0, 0.0, 0.0
            if not self._calls and not self._is_ending:
                self._end_outage("answers again")
            self._changed.notify_all()

    def _fail(self, call: _Call, error: Exception) -> None:
        with self._changed:
            if call not in self._calls:  # finish() has given it up, or it was one too many
                return
            call.failures, call.begun = call.failures + 1, None
            self._failures += 1
            self._fall_behind(f"fails ({call.what}): {type(error).__name__}: {error}")
            log.debug("%s", call.what, exc_info=error)
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._pause else FIRST_PAUSE
            self._next_try = time.monotonic() + self._pause
            if self._is_ending or call.failures >= _TRIES:
                self._drop(call)
                self._lost.append(call.what)
                log.error("%s: gave up %s: %s: %s", self._tracker, call.what, type(error).__name__, error)
            if self._is_ending and self._failures >= 2:  # one may be the call's own fault
                self._lost += [waiting.what for waiting in self._calls]
                self._calls.clear()
            self._changed.notify_all()

    def _drop(self, call: _Call) -> None:
        if call in self._calls:
            self._calls.remove(call)

    # --- what is said -------------------------------------------------------------------------------------------------

    def _fall_behind(self, why: str) -> None:
        if self._is_behind:
            return
        self._is_behind = True
        log.error(
            "%s %s. Training goes on; what is logged waits in memory (%d calls at most), and it is tried again later.",
            self._tracker,
            why,
            MOST,
        )

    def _end_outage(self, how: str) -> None:
        lost, self._lost = self._lost, []
        if lost:
            which = lost[0] if len(lost) == 1 else f"from {lost[0]} to {lost[-1]}"
            log.error("%s %s. %d calls are lost: %s", self._tracker, how, len(lost), which)
        elif self._is_behind:
            log.warning("%s %s. Nothing is lost: it has what had waited.", self._tracker, how)
        self._is_behind = False
