"""Where each piece of a tensor lies in a file.

A ``.distcp`` file is a row of ``torch.save`` archives, one per piece of a tensor. Without the archive's own CRCs (the
manifest has checksums) the bytes around a payload do not depend on the data: they are made once per dtype and shape, and a
save moves nothing but payloads.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from nemologger.checkpoint.state.shares import Piece

# A payload of at least a page starts on one, so that it can be written and read past the page cache.
PAGE = 4096
_SMALL = 64


@dataclass(frozen=True)
class Place:
    """Where a piece lies in its file: ``header``, then its payload, then ``trailer``, from byte ``start`` on."""

    piece: Piece
    start: int
    header: bytes
    trailer: bytes

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + len(self.header) + self.piece.nbytes + len(self.trailer)


@dataclass(frozen=True)
class Entry:
    """What ``.metadata`` says of a piece: its file there, and where in it."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def lay_out(pieces: Iterable[Piece], tensors: Mapping[str, torch.Tensor]) -> list[Place]:
    """Give each piece of one file its place."""
    places = []
    position = 0
    for piece in pieces:
        header, trailer = archive(tensors[piece.key].dtype, piece.sizes)
        payload = _aligned(position + len(header), PAGE if piece.nbytes >= PAGE else _SMALL)
        places.append(Place(piece, payload - len(header), header, trailer))
        position = places[-1].end
    return places


def entries(file: str, places: Iterable[Place]) -> list[Entry]:
    """What ``.metadata`` says of ``places`` in ``file``."""
    return [Entry(p.piece.key, p.piece.offsets, p.piece.sizes, file, p.start, p.end - p.start) for p in places]


def _aligned(position: int, to: int) -> int:
    return -(-position // to) * to


@lru_cache(maxsize=4096)
def archive(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the payload of such a tensor."""
    sample = torch.empty(sizes, dtype=dtype)
    sink = _AroundPayload(sample.nbytes)
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(sample, cast(Any, sink))
    finally:
        torch.serialization.set_crc32_options(checked)
    return sink.parts()


class _AroundPayload(io.RawIOBase):
    """A file that forgets the largest thing written to it, unless that is small enough to search for."""

    def __init__(self, payload: int) -> None:
        self._payload = payload
        self._before = bytearray()
        self._after: bytearray | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        # The records that torch writes around a payload are all smaller than a page.
        if self._after is None and self._payload >= PAGE and len(view) == self._payload:
            self._after = bytearray()
        else:
            (self._before if self._after is None else self._after).extend(view)
        return len(view)

    def parts(self) -> tuple[bytes, bytes]:
        if self._after is not None:
            return bytes(self._before), bytes(self._after)
        whole = bytes(self._before)
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(whole))
        offset = reader.get_record_offset("data/0")
        return whole[:offset], whole[offset + self._payload :]
