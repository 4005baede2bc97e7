"""What a run that was killed has left half done in its directory."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from nemologger.checkpoint.commit import tidy
from nemologger.disk import LocalDisk
from nemologger.disk.lock import DirectoryLock
from nemologger.disk.there import is_dir
from nemologger.stores.remote_disk import disk_of

log = logging.getLogger("nemologger.resume")


def finish(directory: Path) -> None:
    """Finish it, before anybody looks at the checkpoints in ``directory``.

    Raises:
        DirectoryInUseError: If another process trains there.
    """
    remote = disk_of(directory)
    if remote is None and not is_dir(directory):
        return
    with ExitStack() as stack:
        if remote is None:
            lock = DirectoryLock(directory)
            lock.take()
            stack.callback(lock.release)
        for line in tidy(remote or LocalDisk(), directory):
            log.warning("cleaning up after an earlier run in %s: %s", directory, line)
