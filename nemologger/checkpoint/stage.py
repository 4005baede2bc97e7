"""The bytes of a piece, in memory that a file can be written from."""

from __future__ import annotations

import torch

from nemologger.checkpoint.shares import Piece


def payload(tensor: torch.Tensor, piece: Piece) -> memoryview:
    """The bytes of ``piece`` of ``tensor``: the tensor's own memory where that is possible, else a copy."""
    part = tensor.detach()
    for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
        if size != part.shape[dimension]:
            part = part.narrow(dimension, offset, size)
    part = part.resolve_conj().resolve_neg().cpu().contiguous()
    if not piece.nbytes:
        return memoryview(b"")
    # Not reshape: a single element may keep any stride and still be contiguous.
    row = part.as_strided((part.numel(),), (1,))
    return row.view(torch.uint8).numpy().data.cast("B")
