"""``train_toy.py`` on a host that stands still while it publishes ``step=6``: ``frozen_run.py DIRECTORY STEPS [...]``.

It is taken for dead, and so is its lock, which the file server gives to the next who asks. Then it goes on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
from pathlib import Path

import train_toy

from nemologger.disk import LocalDisk, lock


class Standstill:
    """Once, before an entry of ``step=6`` is made durable."""

    def __init__(self) -> None:
        self.sync, self.is_over = LocalDisk.sync, False

    def __call__(self, disk: LocalDisk, directory: Path) -> None:
        if directory.name == "step=6" and not self.is_over:
            self.is_over = True
            (held,) = lock._HELD.values()
            fcntl.fcntl(held.descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, 0, 0, 0, 0))
            os.kill(os.getpid(), signal.SIGSTOP)
        self.sync(disk, directory)


if __name__ == "__main__":
    standstill = Standstill()
    LocalDisk.sync = lambda disk, directory: standstill(disk, directory)
    train_toy.main(sys.argv[1:])
