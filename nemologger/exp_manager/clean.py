"""Remove the checkpoints of an experiment, and keep its logs."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from nemologger import names
from nemologger.checkpoint.commit import retract
from nemologger.checkpoint.find import survey
from nemologger.disk import LocalDisk
from nemologger.disk.lock import DirectoryLock
from nemologger.disk.there import is_dir, is_file, is_symlink

log = logging.getLogger("nemologger.exp_manager")


@rank_zero_only
def clean_exp_ckpt(exp_log_dir: str | Path | None, remove_ckpt: bool = True, remove_nemo: bool = False) -> None:
    """Remove the checkpoints in ``exp_log_dir/checkpoints``. All else in the run directory stays.

    Scripts of NeMo 1 call it on every rank when training is over: rank 0 removes, the others do nothing.

    Args:
        exp_log_dir: A run directory; None, which ``exp_manager`` returns where it does nothing, removes nothing.
        remove_ckpt: Remove the checkpoints: our directories, and ``*.ckpt`` files.
        remove_nemo: Remove ``*.nemo`` files.

    Raises:
        DirectoryInUseError: A run is writing there.

    Example:
        >>> clean_exp_ckpt("runs/demo/v1", remove_nemo=True)
    """
    if exp_log_dir is None:
        return
    directory = Path(exp_log_dir) / names.CHECKPOINTS
    if not is_dir(directory):
        return
    disk = LocalDisk()
    lock = DirectoryLock(directory)
    lock.take()
    try:
        doomed = [found.path for found in survey(directory)] if remove_ckpt else []
        # Links first: none of them points into the void, even for a moment.
        for path in sorted(doomed, key=lambda path: not is_symlink(path)):
            if is_file(path) and not is_symlink(path):
                disk.remove(path)
            else:
                retract(disk, path)
            log.info("removed %s", path)
        for mark in sorted(directory.glob(f"*{names.UNFINISHED}")) if remove_ckpt else []:
            disk.remove(mark)
        for path in sorted(directory.glob("*.nemo")) if remove_nemo else []:
            disk.remove(path)
            log.info("removed %s", path)
        disk.sync(directory)
    finally:
        lock.release()
