"""A request that is under way."""

from __future__ import annotations

import asyncio

import pytest

from nemologger.stores.client import Body, while_it_moves


def test_a_request_whose_bytes_stop_on_their_way_is_given_up():
    async def send(body: Body) -> None:
        try:
            body.read(5)
            await asyncio.Event().wait()
        finally:
            body.close()

    body = Body(b"0123456789")
    with pytest.raises(TimeoutError, match=r"nothing has moved for 0 s"):
        asyncio.run(while_it_moves(send(body), body, 0.2))
    assert body.closed, "the request is still under way"
