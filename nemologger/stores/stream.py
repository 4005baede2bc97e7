"""Large objects of other stores than S3: as one stream, which the store's client cuts as it likes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from nemologger.stores.client import as_os_error


def write_stream(
    client: Any,
    url: str,
    chunks: Iterator[list[memoryview]],
    *,
    create: bool,
    sent: Callable[[int], None],
    drop_half: Callable[[], None] | None,
) -> None:
    """Write an object. What fails in the middle cannot be tried again.

    Args:
        client: The fsspec file system.
        url: Which object.
        chunks: Its parts.
        create: It must not be there already, as far as the client can tell the store.
        sent: Told how many bytes have been taken.
        drop_half: Removes it again, where a store shows what was written of it. None if it shows the whole only.

    Raises:
        FileExistsError: If it is there. It stays as it is.
        OSError: What else went wrong. Nothing of it is left.
    """
    try:
        file = _open_new(client, url) if create else client.open(url, "wb")
        try:
            for chunk in chunks:
                sent(file.write(b"".join(chunk)))
        except BaseException as error:
            # Closing it would publish the half that there is.
            with contextlib.suppress(Exception):
                file.discard()
                file.closed = True
            if drop_half is not None and not isinstance(error, FileExistsError):  # else it is somebody else's
                drop_half()
            raise
        file.close()
    except Exception as error:
        raise as_os_error(error, url) from error


def _open_new(client: Any, url: str) -> Any:
    try:
        return client.open(url, "xb")
    except (NotImplementedError, ValueError):  # it does not know the mode
        return client.open(url, "wb")
