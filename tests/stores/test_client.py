"""A request that is under way."""

from __future__ import annotations

import asyncio
import io

import pytest

from nemologger.stores.client import Body, as_os_error, is_final, while_it_moves


def test_a_request_whose_bytes_stop_on_their_way_is_given_up():
    async def send(body: Body) -> None:
        try:
            body.read(5)
            await asyncio.Event().wait()
        finally:
            body.close()

    body = Body([b"0123456789"])
    with pytest.raises(TimeoutError, match=r"nothing has moved for 0 s"):
        asyncio.run(while_it_moves(send(body), body, 0.2))
    assert body.closed, "the request is still under way"


def test_a_body_reads_as_one_file():
    pieces = [b"", b"abc", memoryview(b"defg"), b"", b"h"]
    body, file = Body(pieces), io.BytesIO(b"abcdefgh")
    assert len(body) == 8
    for offset, whence in ((0, 0), (3, 0), (-2, 2), (9, 0)):
        assert body.seek(offset, whence) == file.seek(offset, whence)
        for size in (2, 0, 3, -1, 4):
            assert body.read(size) == file.read(size)
            assert body.tell() == file.tell()
    body.rewind()
    assert body.read() == b"abcdefgh"


def test_a_redirection_without_end():
    """As S3's client follows a 301 that does not name the bucket's region."""
    error = RecursionError("maximum recursion depth exceeded")
    assert is_final(error)
    assert "another region" in str(as_os_error(error, "s3://bucket/a"))
