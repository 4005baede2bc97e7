"""Tensors, and those in lists and dictionaries."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

_LOOKED_AT = 64


def tensors_in(value: Any, seen: set[int] | None = None, depth: int = 0) -> Iterator[torch.Tensor]:
    """Those that lists, dictionaries and the like hold, of long ones the first."""
    seen = set() if seen is None else seen
    if issubclass(type(value), torch.Tensor):
        yield value
    elif issubclass(type(value), dict | list | tuple | set | deque) and id(value) not in seen and depth < _LOOKED_AT:
        seen.add(id(value))  # what is within may hold it
        for item in islice(dict.values(value) if isinstance(value, dict) else value, _LOOKED_AT):
            yield from tensors_in(item, seen, depth + 1)


def memory_of(tensor: torch.Tensor) -> int:
    """What is the same for tensors that share their memory."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return (tensor.untyped_storage().data_ptr() if plain else 0) or id(tensor)


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if not isinstance(value, dict | list | deque):
        return value
    made: Any = copy.copy(value)  # of the same kind, and as limited
    made.clear()
    if isinstance(value, dict):
        made.update({key: moved(item, device) for key, item in value.items()})
    else:
        made.extend(moved(item, device) for item in value)
    return made
