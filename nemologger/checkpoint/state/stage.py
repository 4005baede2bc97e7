"""The bytes of a piece, in memory that a file can be written from, or read into."""

from __future__ import annotations

import torch


def payload(part: torch.Tensor) -> memoryview:
    """The bytes of ``part``: the tensor's own memory where that is possible, else a copy."""
    return _bytes(part.detach().resolve_conj().resolve_neg().cpu().contiguous())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous ``tensor`` on the CPU, to be filled."""
    return _bytes(tensor)


def _bytes(part: torch.Tensor) -> memoryview:
    if not part.numel():
        return memoryview(b"")
    # Not reshape: a single element may keep any stride and still be contiguous.
    row = part.as_strided((part.numel(),), (1,))
    return row.view(torch.uint8).numpy().data.cast("B")
