"""Takes away beside training what is surplus: checkpoints, and the optimizer state of those that stay.

To give back the blocks of 1 GB takes a file system a tenth of a second and more, in which the caller has nothing to do but
wait. So only what makes a checkpoint count is removed at once; the rest goes in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from nemologger.checkpoint import commit
from nemologger.checkpoint.keeping.retention import Kept
from nemologger.checkpoint.keeping.thinning import thin
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
        self._thinned: set[Kept] = set()

    def remove(self, checkpoint: Path) -> None:
        """Unpublish ``checkpoint`` now, and remove it soon."""
        try:
            left = commit.unpublish(self._disk, checkpoint)
        except OSError as error:
            _warn(checkpoint, error)
            return
        if left:
            self._do(checkpoint, partial(commit.clear, self._disk, checkpoint))

    def abandon(self, checkpoint: Path) -> None:
        """Remove soon what a failed save of ``checkpoint`` may have left; nothing to do if it left nothing."""
        self._do(checkpoint, partial(self._abandon, checkpoint))

    def _abandon(self, checkpoint: Path) -> None:
        with suppress(OSError):  # the disk that failed may fail again; the next save, or the next run, tidies up
            commit.abandon(self._disk, checkpoint)

    def thin(self, kept: Kept) -> None:
        """Take the optimizer state of ``kept`` away soon. Where that failed, asking again tries again."""
        if kept not in self._thinned:
            checkpoint = self._disk.path(kept.path)
            self._do(checkpoint, partial(self._thin, checkpoint, kept))

    def _thin(self, checkpoint: Path, kept: Kept) -> None:
        try:
            thin(self._disk, checkpoint)
        except Exception as error:  # noqa: BLE001  a checkpoint too large is no reason to stop
            log.warning("checkpoint %s keeps its optimizer state, which could not be removed: %s", checkpoint, error)
        else:
            self._thinned.add(kept)

    def _do(self, checkpoint: Path, job: Callable[[], None]) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="nemologger-remove")
        self._pending.append((checkpoint, self._pool.submit(job)))

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
