"""What ``-last`` is: a directory of hard links, a symbolic link, or, where there are neither, a copy."""

from __future__ import annotations

import logging

from nemologger import names
from nemologger.checkpoint.keeping.decision import Decision
from nemologger.disk import Disk

log = logging.getLogger(__name__)


class LastLink:
    """Says which, by what the file system of the checkpoints can do. That is tried once, with the first that is there.

    Args:
        disk: Where they are.
        wanted: Whether it is to be a symbolic link where such links exist. Without renames, in a store, it always is one.
    """

    def __init__(self, disk: Disk, *, wanted: bool) -> None:
        self._disk = disk
        self._is_symbolic = self._wanted = wanted or not disk.can_rename
        self._is_probed = not disk.can_rename
        self._told = ""

    def is_symbolic(self, decision: Decision) -> bool:
        """Whether the ``-last`` of what ``decision`` has written is to be a symbolic link.

        Without hard links it is: a copy of all bytes would hold up training.
        """
        if not self._is_probed and decision.last not in (None, decision.path):
            self._is_probed = True
            checkpoint = self._disk.path(decision.path)
            probe = checkpoint.with_name(f".{checkpoint.name}.partial")
            shares = self._disk.can_link(checkpoint / names.MANIFEST, probe)
            self._is_symbolic = (self._wanted or not shares) and self._disk.can_symlink(probe, checkpoint.name)
            if self._is_symbolic and not self._wanted:
                self._say_once(
                    f"{checkpoint.parent} has no hard links: -last is a symbolic link, as with save_last='link'"
                )
            elif not self._is_symbolic and not shares:
                self._say_once(
                    f"{checkpoint.parent} has neither hard nor symbolic links: -last is a copy, which takes as much room as "
                    "the checkpoint, and time again. save_last=False does without"
                )
            elif not self._is_symbolic and self._wanted:
                self._say_once(f"{checkpoint.parent} has no symbolic links: -last shares its files through hard links")
        return self._is_symbolic

    def ask_again(self) -> None:
        """A save has failed: the disk may have been full, or away, when it was tried."""
        self._is_probed = not self._disk.can_rename

    def _say_once(self, what: str) -> None:
        if what != self._told:
            self._told = what
            log.warning("the file system of %s", what)
