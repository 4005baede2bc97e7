"""The bytes of a piece, in memory that a file can be written from, or read into."""

from __future__ import annotations

import torch

from nemologger.checkpoint.shares import Piece


def payload(tensor: torch.Tensor, piece: Piece) -> memoryview:
    """The bytes of ``piece`` of ``tensor``: the tensor's own memory where that is possible, else a copy."""
    part = part_of(tensor.detach(), piece).resolve_conj().resolve_neg().cpu().contiguous()
    return _bytes(part)


def memory_of(tensor: torch.Tensor, piece: Piece) -> memoryview:
    """The memory of ``piece`` of a contiguous ``tensor`` on the CPU, to be filled."""
    return _bytes(part_of(tensor, piece))


def part_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The view of ``tensor`` that ``piece`` is."""
    for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
        if size != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, offset, size)
    return tensor


def _bytes(part: torch.Tensor) -> memoryview:
    if not part.numel():
        return memoryview(b"")
    # Not reshape: a single element may keep any stride and still be contiguous.
    row = part.as_strided((part.numel(),), (1,))
    return row.view(torch.uint8).numpy().data.cast("B")
