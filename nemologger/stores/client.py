"""The client of an object store, as fsspec knows it: how it is opened, and what its errors mean."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from nemologger.errors import CheckpointError, ConfigurationError, NemologgerError

#: The protocols of stores that speak S3.
S3 = ("s3", "s3a")
#: Those of Google's.
GOOGLE = ("gs", "gcs")
_AZURE = ("az", "abfs", "abfss")

# Loggers that would fill the run's log file, and what they may say: ten lines for each request; a warning for each, and a
# traceback for each that fails, whose error is raised as well.
_CHATTER = {
    **dict.fromkeys(_AZURE, ("azure.core.pipeline.policies.http_logging_policy", logging.WARNING)),
    **dict.fromkeys(GOOGLE, ("gcsfs", logging.CRITICAL)),
}
_PACKAGES = {
    "s3": "'nemologger[s3]'",
    "s3a": "'nemologger[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    **dict.fromkeys(_AZURE, "adlfs"),
}
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    RecursionError,
    ValueError,
    TypeError,
    AttributeError,
)
_FINAL_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EMSGSIZE}
_FINAL_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"}
_OF_KEYS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# Answers of a server that another try does not change, from "bad request" on; not those for "later" and "in conflict".
_REFUSALS = set(range(400, 407)) | {410}
_LEAVING = 10.0  # seconds

#: What to do about a store that cannot be used.
ADVICE = (
    "Check bucket, endpoint, region and credentials: they come from the client's usual environment (s3: AWS_*, abfs: "
    "AZURE_STORAGE_*, gs: GOOGLE_APPLICATION_CREDENTIALS) or from storage_options."
)


class Body(io.RawIOBase):
    """What a request sends, and when the last of it was taken: S3's client reads it as fast as the network takes it.

    It is read from where it is. (aiohttp copies an ``io.BytesIO``, and many requests are on their way.)

    Args:
        pieces: The bytes, one piece after the other; they must stay as they are.
    """

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._pieces = [memoryview(piece).cast("B") for piece in pieces]
        self._starts = list(accumulate(map(len, self._pieces), initial=0))
        self._position = 0
        self.moved = time.monotonic()

    def __len__(self) -> int:
        return self._starts[-1]

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """See :class:`io.RawIOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See :class:`io.RawIOBase`."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self)}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """See :class:`io.RawIOBase`."""
        self.moved = time.monotonic()
        at, end = self._position, len(self)
        if size is not None and size >= 0:
            end = min(end, at + size)
        taken = []
        index = bisect_right(self._starts, at) - 1
        while at < end:
            start = self._starts[index]
            taken.append(self._pieces[index][at - start : end - start])
            at += len(taken[-1])
            index += 1
        self._position = max(self._position, end)
        return b"".join(taken)

    def rewind(self) -> None:
        """Begin again."""
        self.seek(0)
        self.moved = time.monotonic()


async def while_it_moves(request: Awaitable[Any], body: Body, limit: float) -> Any:
    """The outcome of a request that sends ``body``, however long it takes.

    Raises:
        TimeoutError: Nothing of ``body`` was taken, and nothing was answered, for ``limit`` seconds.
    """
    task = asyncio.ensure_future(request)
    try:
        while not task.done():
            left = body.moved + limit - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"nothing has moved for {limit:.0f} s")
            await asyncio.wait({task}, timeout=left)
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=_LEAVING)  # else it would read on beside the next try


def open_file_system(root: str, options: Mapping[str, Any]) -> Any:
    """The fsspec file system of ``root``, with nothing cached.

    Raises:
        ConfigurationError: If nobody here knows the protocol, or its client does not take the options.
    """
    from fsspec.core import url_to_fs

    protocol = root.partition("://")[0]
    settings = {"use_listings_cache": False, "skip_instance_cache": True, **options}
    if protocol in S3:
        # Trying again is our business: two of them, one inside the other, multiply the time until somebody is told.
        client = {"retries": {"total_max_attempts": 1}, "read_timeout": 60, "max_pool_connections": 32}
        settings["config_kwargs"] = {**client, **settings.get("config_kwargs", {})}
    try:
        system, _ = url_to_fs(root, **settings)
    except ImportError as error:
        raise ConfigurationError(
            f"{root}: {error}. Install what brings it: python -m pip install {_PACKAGES.get(protocol, '<package>')}"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{root}: {error}. {ADVICE}") from error
    if protocol in S3:
        system.retries = 1
    if protocol in _CHATTER:
        name, level = _CHATTER[protocol]
        chatter = logging.getLogger(name)
        if chatter.level == logging.NOTSET:
            chatter.setLevel(level)
    return system


def check_protocol(root: str) -> None:
    """Refuse a protocol that nobody here knows.

    Raises:
        ConfigurationError: If its package is not installed, or there is none.
    """
    from fsspec import get_filesystem_class

    protocol = root.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        how = f": python -m pip install {package}" if package else ""  # fsspec names what is missing
        raise ConfigurationError(f"{root}: {error}{how}") from error
    except ValueError as error:
        raise ConfigurationError(f"{root}: {error}; give a local path, or a URL that fsspec knows") from error


@contextlib.contextmanager
def before_training(unknown: str) -> Iterator[None]:
    """What a store does not answer before training is an error that says what to do.

    Args:
        unknown: What is not known then.

    Raises:
        CheckpointError: In place of an OSError of a store.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, NemologgerError) or "://" not in str(error.filename):
            raise
        raise CheckpointError(
            f"{error.filename} cannot be reached: {error.strerror}. {unknown} is not known, so nothing was started. {ADVICE}"
        ) from error


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
        return True
    return _status(error) in _REFUSALS or (isinstance(error, OSError) and error.errno in _FINAL_NUMBERS)


def as_os_error(error: Exception, url: str, more: str = "") -> OSError:
    """``error`` as an OSError that names ``url``, of the kind that a file system would raise."""
    numbers = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}
    known = next((number for kind, number in numbers.items() if isinstance(error, kind)), None)
    known = errno.EEXIST if _is_taken(error) else known
    number = known or (error.errno if isinstance(error, OSError) else None) or errno.EIO
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    said = said.partition("\n")[0].rstrip(". ") or (
        "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    )
    if isinstance(error, RecursionError):  # S3's client does so after a 301 that names no region
        said = "it is sent elsewhere without end: the bucket may be in another region than the one that is set"
    elif isinstance(error, NotImplementedError):
        number = errno.ENOSYS
    return OSError(number, f"{said}{more}", url)  # Python makes it a FileNotFoundError and so on by the number


def is_of_keys(error: Exception) -> bool:
    """Whether the store takes the credentials no longer, or there are none."""
    return _code(error) in _OF_KEYS or type(error).__name__ in _FINAL_NAMES or _status(error) in (401, 403)


def _is_taken(error: Exception) -> bool:
    """Whether it is S3's for an object that was to be created and is there.

    s3fs knows it by the name of the condition, which AWS puts into its answer and other servers leave out. There is no other
    condition that anything here is asked under.
    """
    return _code(error) in ("PreconditionFailed", "412")


def _status(error: Exception) -> int | None:
    """The number of a server's answer, from clients that say it: Azure's and Google's. (Of S3 there is an OSError.)"""
    known = (str(getattr(error, name, "")) for name in ("status_code", "status", "code"))
    return next((int(status) for status in known if status.isdigit()), None)


def _code(error: Exception) -> str:
    """What S3 calls it, "" if that is not known."""
    answer = getattr(error.__cause__, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
