"""What the ranks leave for each other in the store that the run was started with, as long as that answers.

The store is rank 0's or its launcher's, and falls silent with their host: one that has lost its power, or its network,
closes no connection, and neither does a process that is stopped. torch waits for the answer of a store without end. Here
somebody else waits for it, who ends with the process.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds that the store has to answer.
_ANSWER = 10.0


class Notes:
    """A store that is asked no more once it was silent.

    All methods raise a RuntimeError if it does not answer, or has gone.

    Args:
        store: torch's.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._is_silent = False

    def set(self, key: str, value: str) -> None:
        """Leave ``value`` under ``key``."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """What is there under ``key``."""
        return self._ask(lambda: bytes(self._store.get(key)))

    def add(self, key: str, amount: int) -> int:
        """Add ``amount`` to the number there; the sum."""
        return self._ask(lambda: int(self._store.add(key, amount)))

    def _ask(self, question: Callable[[], T]) -> T:
        if self._is_silent:
            raise RuntimeError("the store was silent")
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001  raised by whoever waits for it
                answer.set_exception(error)

        Thread(target=ask, name="nemologger-store", daemon=True).start()
        try:
            return answer.result(_ANSWER)
        except NoAnswer as error:
            self._is_silent = True
            raise RuntimeError(f"the store did not answer within {_ANSWER:g} s") from error
