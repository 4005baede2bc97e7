"""The live tensors that what is loaded can be read straight into, instead of being copied there afterwards.

A module's own ``load_state_dict`` is called all the same. It finds tensors that are its own, and copying one onto itself
does nothing. That holds as long as nobody else looks at what is loaded, or changes it, on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import nn

from nemologger.checkpoint.state.snapshot import is_stored
from nemologger.checkpoint.state.stage import can_be_filled, expanded_along

#: For what is stored, size and dtype by key: the live tensors for it, by key. Several of them may be the same memory; what
#: is stored for the last of them belongs there, as when one is copied after the other.
Places = Callable[[Mapping[str, tuple[tuple[int, ...], torch.dtype]]], Mapping[str, torch.Tensor]]

# Whose modules load their own tensors as they are, and look at no others.
_KNOWN = ("torch.nn.", "torchmetrics.")
_PLAIN = (torch.Tensor, nn.Parameter)


def places_of(module: nn.Module) -> Places:
    """The places in ``module``, by the keys of its state dictionary; none if it has its own way to load one."""

    def places(stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
        if not loads_plainly(module):
            return {}
        state = {key: value for key, value in module.state_dict().items() if key in stored}
        own = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
        own = {key: own[key] for key in state if key in own}
        if any(
            isinstance(value, torch.Tensor) and type(value) not in _PLAIN for value in (*own.values(), *state.values())
        ):
            return {}  # sharded, quantized: there is more to them than memory
        return fitting(
            {key: value for key, value in own.items() if is_stored(value)},
            stored,
            # A hook may have put something else into the state dictionary.
            lambda key, tensor: isinstance(state[key], torch.Tensor) and _is_same(tensor, state[key]),
        )

    return places


def fill_special(module: nn.Module, state: dict[str, Any]) -> None:
    """Load what ``load_state_dict`` of ``module`` cannot copy to its place; of ``state``, it finds that to be its own.

    That are expanded tensors, of which several elements are the same memory, and buffers that inference has made.
    """
    for name, part in module.named_modules(remove_duplicate=False):
        for tensors in (part._parameters, part._buffers):  # noqa: SLF001  as in torch's load_state_dict()
            for key, own in tensors.items():
                path = f"{name}.{key}" if name else key
                value = state.get(path)
                if value is None or not _is_special(own, value):
                    continue
                if not own.is_inference():
                    _fill_expanded(own, value)
                    state[path] = own
                elif type(own) is torch.Tensor:
                    tensors[key] = own.clone()


def _is_special(own: Any, value: Any) -> TypeGuard[torch.Tensor]:
    """Whether it is a tensor of torch's own, as ``value`` for it is, that cannot be filled."""
    if type(own) not in _PLAIN or type(value) is not torch.Tensor or own.layout is not torch.strided:
        return False
    return not own.is_nested and own.shape == value.shape and not can_be_filled(own)


def _fill_expanded(own: torch.Tensor, value: torch.Tensor) -> None:
    once, values = own.detach(), value
    for dim in expanded_along(own):
        once, values = once.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    if torch.equal(values.expand_as(value), value):
        once.copy_(values)
    else:  # it was another tensor when it was saved
        own.data = value.to(own.device, own.dtype, copy=True)


def loads_plainly(module: nn.Module) -> bool:
    """Whether ``load_state_dict`` of ``module`` copies each tensor to its own place, and does nothing else with it."""
    if getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict:
        return False
    if torch.__future__.get_swap_module_params_on_conversion():
        return False
    for one in module.modules():
        if one._load_state_dict_pre_hooks:  # noqa: SLF001  no public name
            return False
        load = getattr(one._load_from_state_dict, "__func__", None)  # noqa: SLF001  what torch documents to override
        if load is None or not load.__module__.startswith(_KNOWN):
            return False
    return True


def loaded_otherwise(module: nn.Module) -> list[str]:
    """What the keys of ``module``'s state dictionary begin with that some part of it loads in a way of its own.

    What is stored under such keys may have other names and sizes: buffers that grow, parameters without a shape yet, names
    of an earlier version.
    """
    if getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict:
        return [""]
    named = module.named_modules(remove_duplicate=False)
    return [f"{name}." if name else "" for name, one in named if _has_own_way(one)]


def _has_own_way(module: nn.Module) -> bool:
    load = getattr(module._load_from_state_dict, "__func__", None)  # noqa: SLF001  what torch documents to override
    hooks = module._load_state_dict_pre_hooks.values()  # noqa: SLF001  no public name
    # Those of wrappers that shard or recompute see to names and parts; what is stored has neither.
    return not _is_from(load, "torch.nn.") or not all(_is_from(hook, "torch.distributed.") for hook in hooks)


def _is_from(function: Any, package: str) -> bool:
    function = getattr(function, "hook", function)  # as torch keeps it
    return str(getattr(getattr(function, "func", function), "__module__", "")).startswith(package)


def fitting(
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    suits: Callable[[str, torch.Tensor], bool] = lambda key, tensor: True,
) -> dict[str, torch.Tensor]:
    """Those of ``tensors``, all of which are about to get what is ``stored``, that can be read into, in the same order.

    Two of the same memory (tied weights) are among them if both fit. One that has only a part of its memory in common with
    another is not, nor is the other: what is copied first and what last makes a difference then.
    """
    fits = {
        key: suits(key, tensor) and (tuple(tensor.shape), tensor.dtype) == stored[key] and _is_plain_memory(tensor)
        for key, tensor in tensors.items()
    }
    chosen = set()
    for keys in _sharing(tensors):
        first = tensors[keys[0]]
        if all(fits[key] and _is_same(first, tensors[key]) for key in keys):
            chosen.update(keys)
    return {key: tensor.detach() for key, tensor in tensors.items() if key in chosen}


def _sharing(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The keys of ``tensors``, those together that have memory of the CPU in common, directly or through others."""
    ranges = sorted((*_range(tensor), key) for key, tensor in tensors.items() if tensor.device.type == "cpu")
    group: list[str] = []
    group_end = 0
    for start, end, key in ranges:
        if group and start >= group_end:
            yield group
            group = []
        group_end = max(end, group_end) if group else end
        group.append(key)
    if group:
        yield group


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` are the bytes of its memory one after the other, and may be changed there."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized or tensor.is_inference())
    )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.device == other.device
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
    )
