"""What each rank adds to a checkpoint, as a row of bytes.

All ranks wait while rank 0 writes what they have added. Of each of them that is one thing then, instead of dozens of small
tensors: with 512 ranks, a tenth of a second instead of one. It is compressed: most of it are states of generators. Several
are equal, and torch's have as many zeros as numbers.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from typing import Any

import torch

from nemologger.checkpoint.state.plain import Encoder, decode
from nemologger.checkpoint.weights import dump_common
from nemologger.checkpoint.weights.reading import reading

#: What is so many times as long as it is written comes from nobody who means well.
_MOST = 100
#: More than that are samples or tensors: training would wait for seconds, and little would be gained.
_LARGE = 1 << 20
_UNCOMPRESSED = b"PK"  # what is large, or was written by an older version


def pack(added: dict[str, Any], say: Callable[[str, str], None]) -> bytes:
    """``added`` for :func:`unpack`; ``say`` is told where in it something has no plain form, and why."""
    encoder = Encoder()
    packed = dump_common(encoder.encode(added))
    for where, why in encoder.left_out.items():
        say(where, f"is not saved: {why}")
    if len(packed) > _LARGE:
        return packed
    compressed = zlib.compress(packed, 1)
    return compressed if _MOST * len(compressed) >= len(packed) else packed


def unpack(packed: bytes | dict[str, Any]) -> dict[str, Any]:
    """What :func:`pack` was given, or that itself. Runs no code of it."""
    if isinstance(packed, dict):
        return packed
    with reading("what a rank has added to the checkpoint"):
        content = io.BytesIO(packed if packed.startswith(_UNCOMPRESSED) else _decompressed(packed))
        added: dict[str, Any] = decode(torch.load(content, map_location="cpu", weights_only=True))
    return added


def _decompressed(packed: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, _MOST * len(packed))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not stream.eof:
        raise ValueError(f"it ends too early, or is more than {_MOST} times as long as it is written")
    return content
