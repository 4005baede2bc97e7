"""What a program makes before training, and does not make alike in each start: nothing else would tell.

``self.noise = torch.randn(8)`` without a seed, or a vocabulary numbered by ``set(words)``, whose order Python draws for each
process. What has not changed in training is not kept, as the program of today may be another one: it is compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import xxhash
from torch import nn

from nemologger.exact.reach.objects import within
from nemologger.exact.reach.parts import attributes, with_slots
from nemologger.exact.values import contents
from nemologger.exact.values.tensors import memory_of

#: Objects to look at, and names in one of them.
_MOST_OBJECTS, _MOST_NAMES = 1000, 2**18

#: By path: a number for what is there at all, the shape of an array or names in any order, and one for all of it.
Made = dict[str, tuple[int, int]]


def made(roots: Mapping[str, object], leave: Collection[str] = (), *, arrays: bool = True) -> Made:
    """What arrays and lists and dictionaries of names hold, of some objects and of those of the program that they hold.

    Args:
        roots: The objects, by name.
        leave: Attributes of these names.
        arrays: Whether to look at arrays and tensors as well.
    """
    found: Made = {}
    models = [root for root in roots.values() if isinstance(root, nn.Module)]
    saved = set(chain.from_iterable(map(_in_checkpoint, models)))
    for path, holder in _objects(roots):
        for name, value in attributes(holder).items():
            if name in leave or (issubclass(type(value), torch.Tensor) and memory_of(value) in saved):
                continue
            if contents.is_in_memory(value):
                if arrays:
                    shape = f"{value.dtype}{tuple(value.shape)}"
                    found[f"{path}.{name}"] = _digest([shape]), contents.fingerprint(value) >> 1
            elif (names := _of_names(value)) is not None:
                found[f"{path}.{name}"] = names
    return found


def made_otherwise(then: Mapping[str, Iterable[int]], now: Made) -> list[str]:
    """The paths of what holds other numbers now, or the same names in another order; what is of another shape was meant."""
    both = [(path, tuple(then[path]), number) for path, number in now.items() if path in then]
    return [path for path, before, number in both if before[0] == number[0] and before[1] != number[1]]


def without(made: Made, *brought_back: Iterable[str]) -> Made:
    """``made`` but for these paths: what training has changed and a checkpoint brings back."""
    return {path: made[path] for path in made.keys() - set(chain(*brought_back))}


def _objects(roots: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = list(roots.items())
    while waiting and len(seen) < _MOST_OBJECTS:
        path, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        parts = with_slots(value).get("_modules") if isinstance(value, nn.Module) else None
        for name, item in {**attributes(value), **(parts or {})}.items():
            waiting += within(f"{path}.{name}", item)


def _in_checkpoint(model: nn.Module) -> Iterator[int]:
    """The memory of its parameters, and of the buffers that it wants to be saved; other names for them are in there, too."""
    for part in model.modules():
        own = chain(part._parameters.items(), part._buffers.items())  # noqa: SLF001
        passing = part._non_persistent_buffers_set  # noqa: SLF001
        yield from (memory_of(value) for name, value in own if value is not None and name not in passing)


def _of_names(value: Any) -> tuple[int, int] | None:
    """For a list of texts or whole numbers, and a dictionary from the one to the other."""
    if not any(type(value) is kind for kind in (list, tuple, dict)) or not 1 < len(value) <= _MOST_NAMES:
        return None
    if not isinstance(value, dict):
        return (_digest(sorted(value)), _digest(value)) if _are_names(value) else None
    keys, values = list(dict.keys(value)), list(dict.values(value))
    if not (_are_names(keys) and _are_names(values)):
        return None
    pairs = chain.from_iterable(sorted(dict.items(value)))
    return _digest([*sorted(keys), *sorted(values)]), _digest(pairs)


def _are_names(values: Sequence[Any]) -> bool:
    kind = type(values[0])
    return (kind is str or kind is int) and all(type(value) is kind for value in values)


def _digest(names: Iterable[Any]) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(map(str, names)).encode(errors="surrogatepass")) >> 1
