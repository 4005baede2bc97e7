"""Large objects of S3: uploads in parts that travel side by side, and what is left of those that nobody finished."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nemologger.stores.client import Body

log = logging.getLogger(__name__)

#: Requests of one object.
AT_ONCE = 8

_GROW_AFTER = 1000  # parts: S3 takes 10,000, so every so many they double

# Says, in the object's metadata, which upload has made it.
_MARK = "nemologger-upload"

#: A method of S3 by its name, tried again while that may help; what goes wrong is an OSError.
Call = Callable[..., Any]


def cut(parts: Iterator[memoryview], smallest: int) -> Iterator[list[memoryview]]:
    """``parts``, gathered and cut into what one request carries: ``smallest`` bytes, and later more."""
    pending: list[memoryview] = []
    size = number = 0
    for part in parts:
        while part:
            room = (smallest << (number // _GROW_AFTER)) - size
            taken, part = part[:room], part[room:]
            pending.append(taken)
            size += len(taken)
            if len(taken) == room:
                yield pending
                pending, size, number = [], 0, number + 1
    if pending:
        yield pending


def write_parts(
    call: Call,
    bucket: str,
    key: str,
    chunks: Iterator[list[memoryview]],
    *,
    create: bool,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an object: it is there when all of it is.

    Args:
        call: How the store is asked.
        bucket: Where.
        key: Its name.
        chunks: Its parts.
        create: It must not be there already.
        metadata: What is to be said of it.

    Raises:
        FileExistsError: If it is, and this upload has not made it.
        OSError: What else went wrong. Nothing of it is left.
    """
    target: dict[str, Any] = {"Bucket": bucket, "Key": key}
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if create else {}
    mark = secrets.token_hex(8)
    begun = call("create_multipart_upload", **target, Metadata={**(metadata or {}), _MARK: mark})
    target["UploadId"] = begun["UploadId"]
    done: list[dict[str, Any]] = []

    def put(number: int, body: Body) -> dict[str, Any]:
        answer = call("upload_part", **target, PartNumber=number, Body=body)
        sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and value}
        sums.pop("ChecksumType", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}

    pending: deque[Future[dict[str, Any]]] = deque()
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="nemologger-put")
    try:
        for number, chunk in enumerate(chunks, 1):
            if len(pending) == AT_ONCE:
                done.append(pending.popleft().result())
            pending.append(pool.submit(put, number, Body(chunk)))
        done += [part.result() for part in pending]
        try:
            call("complete_multipart_upload", **target, **condition, MultipartUpload={"Parts": done})
        except (FileExistsError, FileNotFoundError):
            # Either may be what a second try is told, after the first was done and its answer lost: that there is such an
            # object already, or no such upload any more.
            if _mark_of(call, bucket, key) != mark:
                raise
        with contextlib.suppress(OSError):  # one that was begun, and the answer lost, has no other end
            drop_uploads(call, bucket, key, lambda found: found == key)
    except BaseException:
        for part in pending:
            part.cancel()
        pool.shutdown(wait=True)
        with contextlib.suppress(OSError):
            call("abort_multipart_upload", **target)
        raise
    finally:
        pool.shutdown(wait=True)


def drop_uploads(call: Call, bucket: str, prefix: str, which: Callable[[str], bool]) -> list[str]:
    """Drop what was begun and never finished of objects whose key begins with ``prefix``, and of which ``which`` says so.

    Returns:
        Their keys. None if the store does not tell of such things, or not us.
    """
    dropped: list[str] = []
    more: dict[str, Any] = {}
    try:
        while True:
            found = call("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
            for upload in found.get("Uploads") or ():
                if which(upload["Key"]):
                    with contextlib.suppress(FileNotFoundError):
                        call("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                        dropped.append(upload["Key"])
            if not found.get("IsTruncated"):
                return dropped
            more = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise
        log.debug("%s does not say which uploads are pending: %s", bucket, error)
    return dropped


def _mark_of(call: Call, bucket: str, key: str) -> str | None:
    """Which upload has made an object; None if it is not there, or was not made by one."""
    try:
        found = call("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return dict(found.get("Metadata") or {}).get(_MARK)
