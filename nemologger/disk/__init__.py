"""The file system: the one way that anything is written, linked, renamed or removed.

    local.py        the protocol that all who write go through, and the local disk
    direct_file.py  large files, past the page cache
    pages.py        memory in large pages, from which that is fast
    lock.py         one live run for a directory
    mounts.py       which disks are there
    there.py        whether something is at a path

An object store behind the same protocol is :mod:`nemologger.stores.remote_disk`.
"""

from __future__ import annotations

from nemologger.disk.local import Disk, LocalDisk

__all__ = ["Disk", "LocalDisk"]
