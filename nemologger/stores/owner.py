"""Whose a directory in a store is. A store has no locks: an object there names the run that has begun last.

The newest start has it: one that was killed is in nobody's way. The older run reads that before it begins a save and before
it publishes, and saves no more: the two would remove each other's checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from uuid import uuid4

from nemologger.stores.path import StorePath

FILE = ".owner"


@dataclass
class _Owned:
    """A directory, by this process, for so many who have taken it."""

    signature: str
    inherited: bool  # from a run that has not given it back: should that go on, it must find that it has it no more
    takers: int = 1


_OWNED: dict[str, _Owned] = {}


class StoreOwner:
    """As :class:`~nemologger.disk.lock.DirectoryLock`, for a directory in a store; nobody is refused.

    Args:
        directory: Which.
    """

    def __init__(self, directory: StorePath) -> None:
        self._directory = directory
        self._owned: _Owned | None = None

    def take(self) -> None:
        """Say that this process has the directory from now on.

        Raises:
            OSError: If that could not be written.
        """
        key = str(self._directory)
        if key in _OWNED:
            self._owned = _OWNED[key]
            self._owned.takers += 1
            return
        inherited = bool(_signature(self._directory))
        owned = _Owned(f"process {os.getpid()} on {socket.gethostname()}\n{uuid4().hex}", inherited)
        self._directory.store.write(f"{key}/{FILE}", [owned.signature.encode()])
        self._owned = _OWNED[key] = owned

    def hold(self) -> None:
        """Nothing to do: an object that somebody has removed is nobody's."""

    def release(self) -> None:
        """Give it back; nothing to do if this process does not have it."""
        owned, self._owned = self._owned, None
        if owned is None:
            return
        owned.takers -= 1
        if owned.takers:
            return
        del _OWNED[str(self._directory)]
        if not owned.inherited:
            with contextlib.suppress(OSError):  # it would replace what the run ends with
                if _signature(self._directory) == owned.signature:
                    self._directory.store.remove_object(f"{self._directory}/{FILE}")


def taken_over_by(directory: StorePath) -> str:
    """Who has ``directory``, which this process had; "" for nobody.

    Raises:
        OSError: If the store does not say.
    """
    owned = _OWNED.get(str(directory))
    found = _signature(directory) if owned is not None else ""
    return "" if owned is None or found in ("", owned.signature) else found.split("\n")[0]


def _signature(directory: StorePath) -> str:
    try:
        return directory.store.read(f"{directory}/{FILE}").decode(errors="replace")
    except FileNotFoundError:
        return ""
