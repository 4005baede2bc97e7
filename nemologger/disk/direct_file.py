"""Large files, past the page cache.

What is written once and not read back soon has no business in the page cache: copying it there costs the CPU more than
the disk takes. ``O_DIRECT`` writes from our own memory instead, in large aligned blocks, while the next block is filled.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from nemologger.disk.pages import own_pages

try:
    import fcntl
except ImportError:  # Windows, which has no O_DIRECT either
    fcntl = None  # type: ignore[assignment]

#: Files smaller than this are not worth the trouble.
WORTHWHILE = 4 << 20

_BLOCK = 8 << 20
_LARGE = 32 << 20
_BUFFERS = 3
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def open_direct(path: str | os.PathLike[str]) -> int | None:
    """A descriptor that writes ``path`` anew past the page cache, or None where the file system cannot do that.

    Some file systems take the flag and refuse what is written then: those of FUSE that hand it on to another one, from
    memory that does not begin on a page. Others say that they have cut a file to its length, which whole pages need in the
    end, and have not: s3fs. So a page is written here, and cut. It is in nobody's way: the file is longer than that.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flag, 0o666)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.pwrite(descriptor, page, 0)
        os.ftruncate(descriptor, 1)
        if os.fstat(descriptor).st_size == 1:
            return descriptor
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno in _REFUSED:
            return None
        raise
    os.close(descriptor)
    return None


def write_direct(descriptor: int, parts: Iterable[memoryview]) -> None:
    """Write ``parts`` one after the other to a descriptor of :func:`open_direct`, durably.

    Raises:
        OSError: What the file system says, for example that the disk is full.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="nemologger-write") as writer:
        buffers = [own_pages(_BLOCK) for _ in range(_BUFFERS)]
        pending: list[Future[None]] = []
        position = filled = 0
        views = [memoryview(buffer) for buffer in buffers]
        try:
            for part in parts:
                while part:
                    turn = (position // _BLOCK) % _BUFFERS
                    if filled == 0 and len(pending) == _BUFFERS:
                        pending.pop(0).result()  # that buffer is free again
                    taken = min(len(part), _BLOCK - filled)
                    views[turn][filled : filled + taken] = part[:taken]
                    filled, part = filled + taken, part[taken:]
                    if filled == _BLOCK:
                        pending.append(writer.submit(_write_at, descriptor, views[turn], position))
                        position, filled = position + _BLOCK, 0
            for write in pending:
                write.result()
            if filled:
                last = views[(position // _BLOCK) % _BUFFERS]
                padded = -(-filled // mmap.PAGESIZE) * mmap.PAGESIZE
                _write_at(descriptor, last[:padded], position)
            os.ftruncate(descriptor, position + filled)
            make_durable(descriptor, position + filled)
        finally:
            for write in pending:
                write.cancel()
            writer.shutdown(wait=True)
            for view in views:
                view.release()
            for buffer in buffers:
                with contextlib.suppress(
                    BufferError
                ):  # an error on its way out holds part of it, and frees it in the end
                    buffer.close()


def write_pages(descriptor: int, padded: memoryview, size: int) -> None:
    """Write the first ``size`` bytes of ``padded``, durably.

    Args:
        descriptor: To which. One of :func:`open_direct` takes whole pages only.
        padded: Those bytes, and what fills up the last page if only whole ones can be written; it begins on a page.
        size: In bytes.

    Raises:
        OSError: What the file system says, for example that the disk is full.
    """
    for start in range(0, len(padded), _LARGE):
        _write_at(descriptor, padded[start : start + _LARGE], start)
    if len(padded) > size:
        os.ftruncate(descriptor, size)
    make_durable(descriptor, size)


def make_durable(descriptor: int, size: int) -> None:
    """Sync a file of which ``size`` bytes were written.

    Raises:
        OSError: What the file system says; EIO if it says nothing, and has kept more bytes, or fewer.
    """
    os.fsync(descriptor)
    found = os.fstat(descriptor).st_size
    if found != size:
        raise OSError(errno.EIO, f"{size} bytes were written, {found} are there")


def _write_at(descriptor: int, block: memoryview, position: int) -> None:
    while block:
        try:
            written = os.pwrite(descriptor, block, position)
        except OSError as error:
            # That is also the answer where only a part of a page has room: on a nearly full disk, or up to a limit to the
            # size of files. What is the matter is said to who writes as usual.
            if error.errno not in _REFUSED or not _write_as_usual(descriptor):
                raise
        else:
            block, position = block[written:], position + written


def _write_as_usual(descriptor: int) -> bool:
    """Through the page cache from now on; whether that is news."""
    flag = getattr(os, "O_DIRECT", 0)
    if fcntl is None or not (flags := fcntl.fcntl(descriptor, fcntl.F_GETFL)) & flag:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~flag)
    return True
