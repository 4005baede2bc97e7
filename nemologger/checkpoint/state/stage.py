"""The bytes of a piece, in memory that a file can be written from, or read into."""

from __future__ import annotations

import torch


def payload(part: torch.Tensor) -> memoryview:
    """The bytes of ``part``: the tensor's own memory where that is possible, else a copy."""
    return _bytes(part.detach().resolve_conj().resolve_neg().cpu().contiguous())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous ``tensor`` on the CPU, to be filled."""
    return _bytes(tensor)


def can_be_filled(tensor: torch.Tensor) -> bool:
    """Whether values can be copied into ``tensor``: not where several elements are the same memory, or inference made it."""
    return not (tensor.is_inference() or expanded_along(tensor))


def expanded_along(tensor: torch.Tensor) -> list[int]:
    """The dimensions along which all elements of ``tensor`` are the same memory, as ``expand()`` leaves them."""
    return [dim for dim in range(tensor.dim()) if tensor.stride(dim) == 0 and tensor.size(dim) > 1]


def _bytes(part: torch.Tensor) -> memoryview:
    if not part.numel():
        return memoryview(b"")
    # Not reshape: a single element may keep any stride and still be contiguous.
    row = part.as_strided((part.numel(),), (1,))
    return row.view(torch.uint8).numpy().data.cast("B")
