"""Memory in pages as large as the kernel gives, which may be shared with another process.

Why it matters, measured on Linux 6.18: writing past the page cache pins and maps every page by itself. From pages of 2 MiB a
durable write of 1 GB takes 0.24 s and 6 ms of processor time, from pages of 4 KiB 0.45 s and 42 ms. Memory that processes
share gets large pages only where an administrator has allowed it (``shmem_enabled``), but the kernel joins small ones that
are there already when it is asked to.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable

LARGE = 2 << 20
_POPULATE_WRITE = 23  # Linux 5.14
_COLLAPSE = 25  # Linux 6.1
_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


class SharedPages:
    """The memory of ``descriptor``, from an address that large pages can begin at.

    Args:
        descriptor: Of a file in memory (``memfd_create``), of at least ``size`` bytes.
        size: In bytes.

    Raises:
        OSError: If it cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.size = size
        # Room for it wherever the next large page begins, then the memory itself in its place.
        room = size + LARGE
        reserved = self._map(None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.address = -(-reserved // LARGE) * LARGE
        try:
            writable = mmap.PROT_READ | mmap.PROT_WRITE
            self._map(self.address, size, writable, mmap.MAP_SHARED | _MAP_FIXED, descriptor)
        except OSError:
            self._libc.munmap(reserved, room)
            raise
        self._array = (ctypes.c_ubyte * size).from_address(self.address)
        # Whoever still has a view of it (a tensor, say) keeps it mapped.
        weakref.finalize(self._array, self._libc.munmap, reserved, room).atexit = False

    @property
    def view(self) -> memoryview:
        """All of it."""
        return memoryview(self._array).cast("B")

    def touch(self) -> None:
        """Have the kernel give every page now. Where it cannot be asked to, the first use of each is slower."""
        self._libc.madvise(self.address, self.size, _POPULATE_WRITE)

    def enlarge(self, go_on: Callable[[], bool]) -> int:
        """Have the kernel give every page, and join them to large ones, wherever the memory is mapped.

        It takes a second or two for each GB. A page that something else holds at the moment stays as it is.

        Args:
            go_on: Asked every few milliseconds.

        Returns:
            How many bytes of the memory lie in pages that were joined.
        """
        done = 0
        for start in range(0, self.size // LARGE * LARGE, LARGE):
            if not go_on():
                break
            done += LARGE if self.join(start) else 0
        return done

    def join(self, start: int) -> bool:
        """As :meth:`enlarge`, of the one large page at ``start``. Whether it is one."""
        at = self.address + start
        self._libc.madvise(at, LARGE, _POPULATE_WRITE)
        return not self._libc.madvise(at, LARGE, _COLLAPSE)

    def _map(self, address: int | None, size: int, access: int, flags: int, descriptor: int) -> int:
        mapped: int | None = self._libc.mmap(address, size, access, flags, descriptor, 0)
        if mapped is None or mapped == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return mapped


def own_pages(size: int) -> mmap.mmap:
    """Memory of this process alone, in large pages where the kernel has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that was built without
        return pages
    return pages
