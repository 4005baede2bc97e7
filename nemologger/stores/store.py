"""An object store, behind fsspec: calls that are tried again, and whose errors are all OSErrors.

fsspec names the protocols (``s3://``, ``gs://``, ``memory://``, …) and brings the clients, which are imported when a
store is first used. What is kept in one place here: how long to try, no listing from a cache, objects written in parts
that travel side by side, and objects that are created only if they are not there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import signature
from itertools import chain, count
from typing import Any

from nemologger.errors import NemologgerError
from nemologger.stores.client import (
    GOOGLE,
    S3,
    Body,
    as_os_error,
    is_final,
    is_of_keys,
    open_file_system,
    while_it_moves,
)
from nemologger.stores.parts import AT_ONCE, cut, drop_uploads, write_parts
from nemologger.stores.stream import write_stream

log = logging.getLogger(__name__)

#: A call that fails is tried again for so many seconds, if it may be the network's or the server's fault.
PATIENCE = 30.0
#: One request takes at most so many seconds, and as long as its bytes take at :data:`SLOWEST`. One that sends bytes to S3
#: may take any time while they move: it is given up when for so many seconds none was taken, and nothing answered.
LIMIT = 120.0
SLOWEST = 64 << 10  # bytes per second: many requests, of several processes, share a line
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
# After a call has failed for all that time, the next ones within so many seconds are not tried again.
_KNOWN_DOWN = 10.0

#: An object of up to so many bytes is one request, a larger one is written in parts of :data:`PART`.
WHOLE = 64 << 20
PART = 16 << 20
_SMALLEST_RANGE = 4 << 20
# Stores that show an object when all of it is there.
_WHOLE_ONLY = (*S3, "gs", "gcs", "az", "abfs", "abfss", "oss", "r2")
# Stores that have no directories: a key is written without making anything first.
_FLAT = (*_WHOLE_ONLY, "memory")


class Store:
    """One bucket, or the like. Two of the same root and options are equal, and one travels between processes.

    Args:
        root: Protocol and bucket (or host), such as ``s3://bucket``.
        options: For the fsspec file system, as ``fsspec.filesystem(protocol, **options)`` takes them. Credentials and
            endpoint come from the client's usual environment where they are not given.
    """

    def __init__(self, root: str, options: Mapping[str, Any] | None = None) -> None:
        self.root = root
        self.options = dict(options or {})
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        self._failed_at = -_KNOWN_DOWN
        self._sent = 0
        self._sending: set[Body] = set()

    def __reduce__(self) -> Any:
        return Store, (self.root, self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and (self.root, self.options) == (other.root, other.options)

    def __hash__(self) -> int:
        return hash(self.root)

    @property
    def protocol(self) -> str:
        """Such as ``s3``."""
        return self.root.partition("://")[0]

    # --- reading --------------------------------------------------------------------------------------------------

    def info(self, url: str) -> dict[str, Any]:
        """What is known of an object, or of the directory that objects below ``url`` make of it.

        Raises:
            FileNotFoundError: If there is neither.
        """
        try:
            found: dict[str, Any] = self._call(url, "info", url)
        except OSError as error:
            if self.protocol in S3 and error.errno in (errno.EACCES, errno.EINVAL):
                self.check(url)  # S3 answers this one with the reason, and a question for one object with a number
            raise
        return found

    def names(self, url: str) -> list[str]:
        """What lies directly below ``url``, sorted; empty if nothing does."""
        return sorted({name for key in self._list(url, "ls") if (name := key.rstrip("/").rpartition("/")[2])})

    def below(self, url: str) -> dict[str, int]:
        """Every object below ``url``, by its path seen from there, and its size."""
        prefix = self.key(url) + "/"
        if self.protocol in S3:
            return dict(self._pages(url, prefix))
        found = self._list(url, "find")
        return {
            key[len(prefix) :]: int(entry.get("size") or 0)
            for key, entry in found.items()
            if key.startswith(prefix) and key != prefix
        }

    def read(self, url: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of an object, or those from ``start`` to before ``end``, as far as it goes, by one request."""
        options: dict[str, Any] = {} if start == 0 and end is None else {"start": start, "end": end}
        if self.protocol in S3 and "max_concurrency" in signature(self._fs.cat_file).parameters:
            options["max_concurrency"] = 1  # else s3fs asks for the size first, since 2026.3
        data: bytes = self._call(url, "cat_file", url, carries=max((end or 0) - start, 0), **options)
        return data

    def read_at_once(self, url: str, start: int, end: int) -> bytes:
        """As :meth:`read`, a long range by several requests at once."""
        if end - start < 2 * _SMALLEST_RANGE:
            return self.read(url, start, end)
        step = max(_SMALLEST_RANGE, -(-(end - start) // AT_ONCE))
        starts = range(start, end, step)
        with ThreadPoolExecutor(len(starts), thread_name_prefix="nemologger-get") as pool:
            return b"".join(pool.map(lambda at: self.read(url, at, min(at + step, end)), starts))

    def _pages(self, url: str, prefix: str) -> Iterator[tuple[str, int]]:
        bucket, key = self._split(url)
        more: dict[str, Any] = {}
        while True:
            try:
                found = self._call(
                    url, "call_s3", "list_objects_v2", Bucket=bucket, Prefix=f"{key}/".lstrip("/"), **more
                )
            except FileNotFoundError:
                return
            for entry in found.get("Contents") or ():
                below = f"{bucket}/{entry['Key']}"[len(prefix) :]
                if below:
                    yield below, int(entry["Size"])
            if not found.get("IsTruncated"):
                return
            more = {"ContinuationToken": found["NextContinuationToken"]}

    def _list(self, url: str, method: str) -> dict[str, dict[str, Any]]:
        own = self.key(url)
        self._fs.invalidate_cache()
        try:
            found = self._call(url, method, url, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        if not isinstance(found, dict):  # Azure's client gives bare names if ``url`` itself is an object
            found = {entry["name"]: entry for entry in found if not isinstance(entry, str)}
        entries: dict[str, dict[str, Any]] = found
        return {key: entry for key, entry in entries.items() if key.rstrip("/") != own}

    @property
    def sent(self) -> int:
        """Bytes of objects that were sent by this process; of what is on its way, those that have left."""
        with self._lock:
            return self._sent + sum(body.tell() for body in self._sending)

    # --- writing --------------------------------------------------------------------------------------------------

    def check(self, url: str) -> None:
        """Ask whether the store answers, and knows the bucket.

        Raises:
            OSError: If not.
        """
        if self.protocol in S3:
            bucket, prefix = self._split(url)
            self._call(url, "call_s3", "list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/".lstrip("/"), MaxKeys=1)
        elif not self.names(url) and self.protocol in GOOGLE:
            try:
                self._call(url, "find", url)  # unlike "ls", it tells nothing there from no bucket
            except FileNotFoundError as error:
                bucket, _ = self._split(url)
                raise FileNotFoundError(errno.ENOENT, f"there is no bucket {bucket}", url) from error

    def write(self, url: str, parts: Iterable[bytes | memoryview], *, create: bool = False) -> None:
        """Write an object: it is there when all of it is. At most a few parts of it are asked for ahead.

        Args:
            url: Which.
            parts: Its bytes, one part after the other. They are sent from where they are, and must stay as they are.
            create: It must not be there already.
        """
        rest = (memoryview(part).cast("B") for part in parts)
        first: list[memoryview] = []
        while sum(map(len, first)) <= WHOLE and (part := next(rest, None)) is not None:
            first.append(part)
        if sum(map(len, first)) <= WHOLE:
            self._prepare(url)
            if create:
                self._create_once(url, first)
            else:
                self._send(url, first)
        elif self.protocol in S3:
            bucket, key = self._split(url)
            metadata = self.options.get("s3_additional_kwargs", {}).get("Metadata")
            write_parts(self._s3(url), bucket, key, cut(chain(first, rest), PART), create=create, metadata=metadata)
        else:
            self._prepare(url)
            if create:
                self._refuse_if_there(url)
            half = None if self.protocol in _WHOLE_ONLY else partial(self.remove_object, url)
            write_stream(self._fs, url, cut(chain(first, rest), PART), create=create, sent=self._count, drop_half=half)

    def create(self, url: str, content: bytes) -> None:
        """Write an object that must not be there.

        Raises:
            FileExistsError: If it is, with another content. (The same is this very write, whose answer was lost.)
        """
        self._prepare(url)
        self._create_once(url, [content])

    def _create_once(self, url: str, content: Sequence[bytes | memoryview]) -> None:
        try:
            self._create(url, content)
        except FileExistsError:
            if self.read(url) != b"".join(content):
                raise

    def _create(self, url: str, content: Sequence[bytes | memoryview]) -> None:
        knows_the_mode = "mode" in signature(self._fs.pipe_file).parameters
        if self.protocol not in S3 or not knows_the_mode:  # clients of other stores may take it and not care
            self._refuse_if_there(url)
            if not knows_the_mode:
                self._send(url, content)
                return
        try:
            self._send(url, content, mode="create")
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            log.debug("%s cannot create objects only if they are not there: %s", self.root, error)
            self._refuse_if_there(url)
            self._send(url, content)

    def _refuse_if_there(self, url: str) -> None:
        if self._call(url, "exists", url):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url)

    def _send(self, url: str, content: Sequence[bytes | memoryview], **options: str) -> None:
        body = Body(content)
        what = body if self.protocol in S3 and len(body) else b"".join(content)
        self._call(url, "pipe_file", url, what, carries=len(body), **options)
        if what is not body:
            self._count(len(body))

    def copy(self, source: str, target: str) -> None:
        """Copy an object; its bytes stay in the store."""
        self._prepare(target)
        self._call(target, "cp_file", source, target)

    def remove(self, url: str) -> None:
        """Remove an object, all below ``url``, and what was begun there and never finished; nothing is fine too."""
        going = [f"{url}/{name}" for name in self.below(url)]
        if not going:
            try:
                self.remove_object(url)
            except PermissionError:  # to remove nothing may be forbidden, too
                if self._call(url, "exists", url):
                    raise
        else:
            with ThreadPoolExecutor(min(AT_ONCE, len(going)), thread_name_prefix="nemologger-remove") as pool:
                for _ in pool.map(self.remove_object, going):
                    pass
        if self.protocol not in _FLAT:
            with contextlib.suppress(OSError):
                self._call(url, "rm", url, recursive=True)
        self.drop_uploads(url)

    def remove_object(self, url: str) -> None:
        """Remove one object; nothing to do if it is not there."""
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            self._call(url, "rm_file", url)

    def drop_uploads(self, url: str, which: Callable[[str], bool] = lambda below: True) -> list[str]:
        """Drop what was begun below ``url`` and never finished, if the store tells of such things.

        Args:
            url: The directory.
            which: Whether the one of that path, seen from ``url``, is to be dropped.

        Returns:
            The paths of those that were.
        """
        if self.protocol not in S3:
            return []
        bucket, key = self._split(url)
        prefix = f"{key}/".lstrip("/")
        dropped = drop_uploads(self._s3(url), bucket, prefix, lambda found: which(found[len(prefix) :]))
        return [found[len(prefix) :] for found in dropped]

    def _s3(self, url: str) -> Callable[..., Any]:
        return partial(self._call, url, "call_s3")

    def _count(self, size: int, body: Body | None = None) -> None:
        with self._lock:
            self._sent += size
            self._sending.discard(body)

    def _prepare(self, url: str) -> None:
        if self.protocol not in _FLAT:
            self._call(url, "makedirs", url.rpartition("/")[0], exist_ok=True)

    # --- calling --------------------------------------------------------------------------------------------------

    def key(self, url: str) -> str:
        """What the store itself calls ``url``."""
        return str(self._fs._strip_protocol(url)).rstrip("/")  # noqa: SLF001  every fsspec file system has it; listings use it

    def _split(self, url: str) -> tuple[str, str]:
        bucket, _, key = self.key(url).partition("/")
        return bucket, key

    @property
    def _fs(self) -> Any:
        """The client, opened where and when it is needed."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), open_file_system(self.root, self.options))
            return self._opened[1]

    def _call(self, url: str, method: str, *arguments: Any, carries: int = 0, **named: Any) -> Any:  # noqa: RET503  it returns or raises
        """Call a method of the client, which ``carries`` so many bytes, again and again while that may help.

        Raises:
            OSError: What went wrong, with ``url``.
        """
        began = time.monotonic()
        is_down = began - self._failed_at < _KNOWN_DOWN
        pause = _FIRST_PAUSE
        for number in count(1):
            try:
                return self._call_once(method, *arguments, limit=LIMIT + carries / SLOWEST, **named)
            except NemologgerError:
                raise
            except Exception as error:
                if is_final(error):
                    if is_of_keys(error):
                        self._opened = None  # there may be new ones where they come from, when it is opened again
                    raise as_os_error(error, url) from error
                waited = time.monotonic() - began
                # One that took all the time there is, because nobody answered, is tried once more all the same; but clients
                # of other stores than S3 try again by themselves.
                too_long = waited + pause > PATIENCE if number > 1 else waited > PATIENCE and self.protocol not in S3
                if is_down or too_long:
                    self._failed_at = time.monotonic()
                    raise as_os_error(error, url, f" (tried for {waited:.0f} s)") from error
                log.debug("%s: %s: %s; once more in %.1f s", url, type(error).__name__, error, pause)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _call_once(self, method: str, *arguments: Any, limit: float, **named: Any) -> Any:
        client = self._fs  # first: threads that import parts of fsspec at the same time find them half done
        from fsspec.asyn import sync

        coroutine = getattr(client, f"_{method}", None) if getattr(client, "async_impl", False) else None
        if coroutine is None:
            return getattr(client, method)(*arguments, **named)
        # The clients' own timeouts leave gaps: a server that never says "100 Continue" is waited for without end.
        body = next((one for one in (*arguments, *named.values()) if isinstance(one, Body)), None)
        if body is None:
            return sync(client.loop, coroutine, *arguments, timeout=limit, **named)
        body.rewind()
        with self._lock:
            self._sending.add(body)
        size = 0
        try:
            answer = sync(client.loop, lambda: while_it_moves(coroutine(*arguments, **named), body, LIMIT))
            size = len(body)
        finally:
            self._count(size, body)
        return answer
