"""An optimizer's state for an optimizer that holds the same parameters, perhaps in another order.

torch knows parameters by their position alone: given in another order, each would get the moments of another one, without
a word. Checkpoints of ours know their names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from nemologger.errors import ModelMismatchError

_SHOWN = 5


def align(
    saved: Mapping[str, Any],
    saved_names: Mapping[int, str],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    defaults: Collection[str],
) -> dict[str, Any]:
    """``saved``, an optimizer's state dictionary, with its parameters in the order of another optimizer.

    Args:
        saved: What was saved.
        saved_names: The name of the parameter behind each of its indices.
        groups: ``param_groups`` of the other optimizer's own state dictionary.
        names: The name of the parameter behind each of its indices.
        defaults: The settings that its kind of optimizer has. What else its groups have (a scheduler that was not there
            before puts ``initial_lr`` and its like there), stays as it is where nothing was saved.

    Raises:
        ModelMismatchError: If the two hold other parameters, group them otherwise, or have other settings.
    """
    if "param_groups" not in saved:
        return dict(saved)  # of one that wraps another, in a form of its own
    index_of = {name: index for index, name in saved_names.items()}
    if len(index_of) != len(saved_names) or len(set(names.values())) != len(names):
        return dict(saved)  # two parameters of one name: only their order tells them apart
    _check_groups(saved["param_groups"], saved_names, groups, names, defaults)
    aligned = []
    for old, new in zip(saved["param_groups"], groups, strict=True):
        by_position = {key: new[key] for key in ("param_names",) if key in new}
        by_position["params"] = [index_of.get(names.get(i, ""), i) for i in new["params"]]
        aligned.append({**new, **old, **by_position})
    return {**saved, "param_groups": aligned}


def check_sizes(optimizer: Optimizer, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
    """Whether ``state`` is of as many elements as the parameters of ``optimizer`` are, if that does not look itself.

    torch's fused optimizers do not: they go through the memory of both as far as the parameter reaches.

    Args:
        optimizer: It has not loaded ``state`` yet.
        state: Its state dictionary.
        names: The name of the parameter behind each of its indices.

    Raises:
        ModelMismatchError: If it is not.
    """
    groups = (*optimizer.param_groups, *state.get("param_groups", ()))  # it takes the settings of what it loads
    if not type(optimizer).__module__.startswith("torch.optim.") or not any(group.get("fused") for group in groups):
        return
    numbers = {id(parameter): n for n, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    for parameter, index in _pairs(optimizer, state):
        for field, value in _fields(state, index).items():
            if isinstance(value, torch.Tensor) and field != "step" and value.shape != parameter.shape:
                number = numbers[id(parameter)]
                raise ModelMismatchError(
                    f"it holds {field} of shape {tuple(value.shape)} for {names.get(number, number)}, whose shape is "
                    f"{tuple(parameter.shape)}: it is of another model, or of parameters in another order. Give them to the "
                    "optimizer as in the run that saved it, or start a new run from its weights alone"
                )


def keep_as_saved(
    optimizer: Optimizer, state: Mapping[str, Any], dtype_then: Callable[[int], torch.dtype | None]
) -> None:
    """When ``optimizer`` next loads ``state``, let it have that as it was saved.

    torch rounds what is loaded to the precision of the parameters (averages that are kept in 32 bits for parameters of 16,
    say), and makes texts and queues anew, the latter without their greatest length. Optimizers that load in a way of their
    own see to that themselves.

    Args:
        optimizer: It has not loaded ``state`` yet.
        state: Its state dictionary.
        dtype_then: That of the parameter behind an index when it was saved. Of parameters that have another one now, the
            precision is as torch makes it.
    """
    if any(
        isinstance(value, deque) for _, index in _pairs(optimizer, state) for value in _fields(state, index).values()
    ):
        _keep_lengths(optimizer, state)
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return

    def put_back(loaded: Optimizer) -> None:
        handle.remove()
        for parameter, index in _pairs(loaded, state):
            present = loaded.state.get(parameter, {})
            rounds = partial(_is_other, parameter.dtype, dtype_then, index)
            for name, value in _fields(state, index).items():
                if name in present:
                    present[name] = _as_saved(present[name], value, rounds)

    handle = optimizer.register_load_state_dict_post_hook(put_back)


def _keep_lengths(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """At its first step: Lightning moves what has been loaded to the device, and makes queues anew once more."""
    lengths = {
        parameter: {name: value.maxlen for name, value in _fields(state, index).items() if isinstance(value, deque)}
        for parameter, index in _pairs(optimizer, state)
    }

    def put_back(stepping: Optimizer, *arguments: object) -> None:
        handle.remove()
        for parameter, queues in lengths.items():
            present = stepping.state.get(parameter, {})
            present.update({name: deque(present[name], queues[name]) for name in queues if name in present})

    handle = optimizer.register_step_pre_hook(put_back)


def _pairs(optimizer: Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Its parameters, each with its index in ``state``. Whether there are as many, torch says when it loads them."""
    for now, then in zip(optimizer.param_groups, state["param_groups"], strict=False):
        yield from zip(now["params"], then["params"], strict=False)


def _fields(state: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """What ``state`` holds for a parameter: of some optimizers that is no dictionary."""
    fields = state.get("state", {}).get(index)
    return fields if isinstance(fields, Mapping) else {}


def _is_other(dtype: torch.dtype, dtype_then: Callable[[int], torch.dtype | None], index: int) -> bool:
    return dtype_then(index) != dtype


def _as_saved(present: Any, value: Any, rounds: Callable[[], bool]) -> Any:
    """``value`` on the devices of ``present``, which torch has made of it."""
    if isinstance(value, torch.Tensor):
        is_rounded = isinstance(present, torch.Tensor) and value.dtype != present.dtype and not rounds()
        return value.to(present.device) if is_rounded else present
    if type(value) in (list, tuple, deque):
        return type(value)(_as_saved(*pair, rounds) for pair in zip(present, value, strict=True))
    if type(value) is dict:
        return {name: _as_saved(present[name], item, rounds) for name, item in value.items()}
    return value if isinstance(value, str | bytes) else present


def _check_groups(
    saved: Sequence[Mapping[str, Any]],
    saved_names: Mapping[int, str],
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    defaults: Collection[str],
) -> None:
    if len(saved) != len(groups):
        raise ModelMismatchError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this one {len(groups)}: configure it as in the "
            "run that saved it, or start a new run from the weights with RestoreConfig"
        )
    for number, (old, new) in enumerate(zip(saved, groups, strict=True)):
        before = {saved_names.get(i, f"number {i}") for i in old["params"]}
        after = {names.get(i, f"number {i}") for i in new["params"]}
        if before != after:
            gone, come = sorted(before - after)[:_SHOWN], sorted(after - before)[:_SHOWN]
            raise ModelMismatchError(
                f"parameter group {number} of the optimizer holds other parameters than in the checkpoint; only there: "
                f"{', '.join(gone) or 'none'}; only here: {', '.join(come) or 'none'}. Give it the same ones, frozen or "
                "not, as in the run that saved it, or start a new run from the weights with RestoreConfig"
            )
        missing = sorted((set(new) - set(old)).intersection(defaults))
        if missing:
            raise ModelMismatchError(
                f"parameter group {number} of the checkpoint's optimizer has no {', '.join(missing[:_SHOWN])}: it was "
                "another kind of optimizer. Configure it as in the run that saved it, or start a new run from the weights "
                "with RestoreConfig"
            )
