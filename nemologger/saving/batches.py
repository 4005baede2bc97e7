"""How many samples a batch holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def batch_size(batch: Any) -> int:
    """The number of samples in ``batch``: the first dimension of the first tensor found in it.

    A batch without a tensor counts as its length if it is a sequence of samples (strings, numbers), else as one sample.

    Example:
        >>> batch_size({"tokens": torch.zeros(4, 128), "mask": torch.zeros(4, 128)})
        4
        >>> batch_size((["a", "b"], [0, 1]))
        2
    """
    for tensor in _tensors(batch):
        return tensor.shape[0] if tensor.ndim else 1
    while isinstance(batch, Mapping | Sequence) and not isinstance(batch, str | bytes) and batch:
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
        if not isinstance(first, Mapping | Sequence) or isinstance(first, str | bytes):
            return len(batch) if isinstance(batch, Sequence) else 1
        batch = first
    return 1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from (item for item in vars(value).values() if isinstance(item, torch.Tensor))
