"""Something that is done beside training, bit by bit, and asked after at every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

from nemologger.checkpoint.writing.progress import wait_aloud

_PAUSE = 0.2


class Errand:
    """Calls a function in a thread, now and then, until it says that all is done.

    The function runs while nobody else uses what it uses: its caller waits with :meth:`wait` before it does. It must not
    talk to other ranks.

    Args:
        step: Does what can be done now, and says whether that was the last of it. It may raise.
        what: What somebody waits for who waits for it.
    """

    def __init__(self, step: Callable[[], bool], what: str) -> None:
        self._step = step
        self._what = what
        self._thread: Thread | None = None
        self._next = 0.0
        self._done = False
        self._error: BaseException | None = None

    def poll(self) -> bool:
        """Whether it has been done since it was last asked; never waits.

        Raises:
            BaseException: What the function raised.
        """
        if self._thread is None:
            if time.monotonic() >= self._next and not self._done:
                self._thread = Thread(target=self._run, name="nemologger-errand", daemon=True)
                self._thread.start()
            return False
        return not self._thread.is_alive() and self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """As :meth:`poll`, after the call that is under way, if that ends within ``seconds``; begins no other.

        Raises:
            BaseException: What the function raised.
        """
        if self._thread is None:
            return False
        # Ctrl-C may end this: the call is still under way then.
        if seconds is None:
            wait_aloud(self._is_over, self._what)
        elif not self._is_over(seconds):
            return False
        self._thread = None
        self._next = time.monotonic() + _PAUSE
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            error = None  # its traceback holds this frame
        return self._done

    def _is_over(self, seconds: float) -> bool:
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._done = self._step()
        except BaseException as error:  # noqa: BLE001  raised again where it is asked after
            self._error = error
