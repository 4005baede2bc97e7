"""An optimizer's state for an optimizer that holds the same parameters, perhaps in another order.

torch knows parameters by their position alone: given in another order, each would get the moments of another one, without
a word. Checkpoints of ours know their names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
