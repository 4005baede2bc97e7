"""Where disks are mounted: one that goes while a run writes to it leaves an empty directory, which is on another disk.

By the places alone, not by the devices' numbers: a disk that is mounted again may get another number, a bind of a directory
has that of the disk it comes from, and some file systems give each directory another one.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def mount_of(path: Path, root: Path = _ROOT) -> Path | None:
    """Where the disk that ``path`` is on is mounted; None if nobody says, as elsewhere than on Linux."""
    there = _mounts(root)
    path = path.resolve()
    return next((one for one in (path, *path.parents) if os.fsencode(one) in there), None)


def has_lost(path: Path, place: Path, root: Path = _ROOT) -> bool:
    """Whether ``path`` lies where the disk at ``place`` was mounted, as :func:`mount_of` has said, and is no more.

    No if nobody says so any more, as where no file can be opened.
    """
    if _may_be_mounted(place, root) or not path.resolve().is_relative_to(place):
        return False
    with suppress(OSError), os.scandir(place):  # an automounter mounts what is asked for
        pass
    return not _may_be_mounted(place, root)


def _may_be_mounted(place: Path, root: Path) -> bool:
    there = _mounts(root)
    return not there or os.fsencode(place) in there


def _mounts(root: Path) -> set[bytes]:
    try:
        lines = (root / "proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    return {_plain(fields[4]) for line in lines if len(fields := line.split(b" ")) > 4}


def _plain(place: bytes) -> bytes:
    """As it is called; spaces and the like are written as numbers."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), place)
