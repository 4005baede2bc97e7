"""An optimizer's state for an optimizer that holds the same parameters, perhaps in another order.

torch knows parameters by their position alone: given in another order, each would get the moments of another one, without
a word. Checkpoints of ours know their names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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


def keep_digits(
    optimizer: Optimizer, state: Mapping[str, Any], dtype_then: Callable[[int], torch.dtype | None]
) -> None:
    """When ``optimizer`` next loads ``state``, let it have what it had in more digits than its parameters have.

    torch rounds what is loaded to the precision of the parameters: averages that are kept in 32 bits for parameters of 16,
    say. Optimizers that load in a way of their own see to that themselves.

    Args:
        optimizer: It has not loaded ``state`` yet.
        state: Its state dictionary.
        dtype_then: That of the parameter behind an index when it was saved. Of parameters that have another one now, state
            is as torch makes it.
    """
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        return

    def put_back(loaded: Optimizer) -> None:
        handle.remove()
        for now, then in zip(loaded.param_groups, state["param_groups"], strict=True):
            for parameter, index in zip(now["params"], then["params"], strict=True):
                for name, value in state["state"].get(index, {}).items():
                    present = loaded.state[parameter].get(name)
                    if _is_rounded(present, value) and dtype_then(index) == parameter.dtype:
                        loaded.state[parameter][name] = value.to(present.device)

    handle = optimizer.register_load_state_dict_post_hook(put_back)


def _is_rounded(present: Any, value: Any) -> bool:
    both = isinstance(present, torch.Tensor) and isinstance(value, torch.Tensor)
    return both and value.dtype != present.dtype


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
                f"{', '.join(gone) or 'none'}; only here: {', '.join(come) or 'none'}"
            )
        missing = sorted((set(new) - set(old)).intersection(defaults))
        if missing:
            raise ModelMismatchError(
                f"parameter group {number} of the checkpoint's optimizer has no {', '.join(missing[:_SHOWN])}: it was "
                "another kind of optimizer. Configure it as in the run that saved it, or start a new run from the weights "
                "with RestoreConfig"
            )
