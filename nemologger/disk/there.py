"""Whether something is at a path; an error of the disk is raised, and is not taken for "no".

Since Python 3.14 the methods of :class:`~pathlib.Path` answer False to every error. A directory that may not be read, or a
server that does not answer for a moment, would look as if there was nothing: no checkpoint to resume from, or one that is
half there and may be removed.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Protocol

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


class Place(Protocol):
    """A path, or one in a store, which raises what it is not told."""

    def exists(self) -> bool: ...  # noqa: D102
    def is_dir(self) -> bool: ...  # noqa: D102
    def is_file(self) -> bool: ...  # noqa: D102
    def is_symlink(self) -> bool: ...  # noqa: D102


def exists(path: Place) -> bool:
    """Whether something is there; a link that leads nowhere is not."""
    return _mode(path) is not None if isinstance(path, Path) else path.exists()


def is_dir(path: Place) -> bool:
    """Whether a directory is there, or a link to one."""
    return stat.S_ISDIR(_mode(path) or 0) if isinstance(path, Path) else path.is_dir()


def is_file(path: Place) -> bool:
    """Whether a regular file is there, or a link to one."""
    return stat.S_ISREG(_mode(path) or 0) if isinstance(path, Path) else path.is_file()


def is_symlink(path: Place) -> bool:
    """Whether a link is there, wherever it leads."""
    return stat.S_ISLNK(_mode(path, follow=False) or 0) if isinstance(path, Path) else path.is_symlink()


def _mode(path: Path, *, follow: bool = True) -> int | None:
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    except ValueError:  # no file can have this name
        pass
    return None
