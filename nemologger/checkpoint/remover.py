"""Takes surplus checkpoints away beside training.

To give back the blocks of 1 GB takes a file system a tenth of a second and more, in which the caller has nothing to do but
wait. So only what makes a checkpoint count is removed at once; the rest goes in a thread.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nemologger.checkpoint import commit
from nemologger.disk import Disk

log = logging.getLogger(__name__)


class Remover:
    """Removes checkpoints, in order. A failure is a warning: a checkpoint too many is no reason to stop.

    Args:
        disk: Where.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[tuple[Path, Future[None]]] = []

    def remove(self, checkpoint: Path) -> None:
        """Unpublish ``checkpoint`` now, and remove it soon."""
        try:
            left = commit.unpublish(self._disk, checkpoint)
        except OSError as error:
            _warn(checkpoint, error)
            return
        if left:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="nemologger-remove")
            self._pending.append((checkpoint, self._pool.submit(commit.clear, self._disk, checkpoint)))

    def wait(self) -> None:
        """Return when all is gone, and nothing runs any more."""
        pending, self._pending = self._pending, []
        for checkpoint, removal in pending:
            try:
                removal.result()
            except OSError as error:
                _warn(checkpoint, error)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _warn(checkpoint: Path, error: OSError) -> None:
    log.warning("checkpoint %s could not be removed: %s. Remove it by hand.", checkpoint, error)
