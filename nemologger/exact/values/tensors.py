"""Tensors, and those in lists and dictionaries."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Container, Iterator
from itertools import chain, count, islice
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


def leaves(value: Any) -> Iterator[Any]:
    """What dictionaries, lists, tuples and deques hold that is none of these."""
    if isinstance(value, dict):
        yield from chain.from_iterable(map(leaves, value.values()))
    elif isinstance(value, list | tuple | deque):
        yield from chain.from_iterable(map(leaves, value))
    else:
        yield value


def on_device(value: Any) -> list[int]:
    """Which tensors of ``value`` are on a GPU, as they come: a program may have some there, and others not."""
    tensors = (leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor))
    return [i for i, tensor in enumerate(tensors) if tensor.device.type != "cpu"]


def moved(value: Any, device: torch.device, which: Container[int]) -> Any:
    """``value`` with those of its tensors on ``device``."""
    numbers, these = count(), set(which) if isinstance(which, list) else which
    return _mapped(value, lambda tensor: tensor.to(device) if next(numbers) in these else tensor)


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor changed, as they come."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple.__new__(type(value), [_mapped(item, change) for item in value])  # it may have names
    if not isinstance(value, dict | list | deque):
        return value
    made: Any = copy.copy(value)  # of the same kind, and as limited
    made.clear()
    if isinstance(value, dict):
        made.update({key: _mapped(item, change) for key, item in value.items()})
    else:
        made.extend(_mapped(item, change) for item in value)
    return made
