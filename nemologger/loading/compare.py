"""Whether a model can load what is saved of one, found out before anything is loaded, and before anybody has to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX  # what a module says of itself: a value, of any size

from nemologger import lightning_port, sharded_state
from nemologger.checkpoint.reading.in_place import loaded_otherwise
from nemologger.checkpoint.reading.load import Opened, weights_of
from nemologger.checkpoint.state.snapshot import Snapshot, is_stored
from nemologger.checkpoint.weights import described, read_common
from nemologger.errors import ModelMismatchError

if TYPE_CHECKING:
    import lightning.pytorch as pl

_SHOWN = 8
_PREFIX = "state_dict."
#: What ``torch.compile(layer)`` puts into the names of what it wraps.
_COMPILED = "_orig_mod."


def check_model(
    checkpoint: Path,
    state: Mapping[str, Any],
    module: torch.nn.Module | None = None,
    *,
    strict: bool = True,
    opened: Opened | None = None,
    advice: str = "or write to another run directory; LightningModule.strict_loading = False loads what fits.",
) -> None:
    """Compare the model in ``checkpoint`` with a state dictionary, before anything is loaded.

    Args:
        checkpoint: Its directory, or its ``weights/``.
        state: The state dictionary.
        module: Whose it is: what a part of it loads in a way of its own is not compared.
        strict: Whether the names must be the same; else, only the shapes of those that both have.
        opened: ``checkpoint``, if that has been opened.
        advice: What else to do than to build the model in another way.

    Raises:
        ModelMismatchError: If they differ; it names the parameters.
    """
    weights = weights_of(checkpoint)
    shapes = described(weights) if opened is None else opened.shapes
    stored = {k.removeprefix(_PREFIX): one for k, (one, _) in shapes.items() if k.startswith(_PREFIX)}
    wanted = shapes_of(state)
    # Extra state may be of another kind today: no tensor then.
    elsewhere = any(_is_extra(key) for key in wanted.keys() - stored.keys())
    others = read_common(weights).get("state_dict", {}) if elsewhere else ()
    found = differences(stored, wanted, state, others, _otherwise(module), strict=strict)
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ModelMismatchError(
            f"{checkpoint} was saved from another model; nothing was loaded. What differs:\n  "
            + "\n  ".join(found[:_SHOWN])
            + more
            + f"\n{_advice(stored.keys(), wanted.keys(), advice)}"
        )


def differences(
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    names: Collection[str],
    others: Collection[str],
    otherwise: tuple[str, ...],
    *,
    strict: bool,
) -> list[str]:
    """What of the tensors ``stored`` does not fit those that a model wants, line by line.

    Args:
        stored: Sizes by name.
        wanted: Sizes by name.
        names: Of all that the model has, tensors or not.
        others: The names of what is stored, and no tensor.
        otherwise: What the names begin with that are not to be compared.
        strict: Whether the names must be the same.
    """
    stored = {key: shape for key, shape in stored.items() if not key.startswith(otherwise)}
    wanted = {key: shape for key, shape in wanted.items() if not key.startswith(otherwise)}
    found = []
    if strict:
        missing = {key for key in wanted.keys() - stored.keys() if not (_is_extra(key) and key in others)}
        found += [f"missing in the checkpoint: {key} {shape}" for key, shape in wanted.items() if key in missing]
        found += [f"missing in the model: {key} {shape}" for key, shape in stored.items() if key not in names]
    return found + [
        f"{key} is {stored[key]} in the checkpoint, {shape} in the model"
        for key, shape in wanted.items()
        if key in stored and stored[key] != shape and not _is_extra(key)
    ]


def _advice(stored: Collection[str], wanted: Collection[str], otherwise: str) -> str:
    """What to do about names that differ."""
    if set(stored) != set(wanted) and _uncompiled(stored) == _uncompiled(wanted):
        return (
            f"The names differ because torch.compile(layer) puts {_COMPILED} into those of the layer that it wraps: compile "
            "the layers that were compiled then. layer.compile() leaves the names alone, for runs that are to go on with "
            "and without."
        )
    return f"Build the model with the settings of that run (they are in its context/model.yaml), {otherwise}"


def _uncompiled(names: Collection[str]) -> set[str]:
    return {name.replace(_COMPILED, "") for name in names}


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The sizes of those tensors of ``state`` that are stored as such, and have one."""
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if is_stored(value) and not torch.nn.parameter.is_lazy(value)
    }


class Beginning:
    """Model and optimizers as training starts with them: as the next start of the program will have them, too.

    Args:
        trainer: About to train.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        module, strategy = trainer.lightning_module, trainer.strategy
        # FSDP makes tensors of its own, and nothing can be said of what a program loads in its own way.
        skip = sharded_state.flattened(strategy) is not None or lightning_port.will_rewrite_state(module)
        state = {} if skip else sharded_state.model_state(strategy)
        self._names = frozenset(state)
        self._lazy = frozenset(key for key, value in state.items() if torch.nn.parameter.is_lazy(value))
        self._shapes = shapes_of(state)
        regroups = any(isinstance(callback, BaseFinetuning) for callback in lightning_port.callbacks(trainer))
        self._optimizers = None if skip or regroups else _groups_of(trainer)

    def changes(self, trainer: pl.Trainer, taken: Snapshot) -> list[str]:
        """What of ``taken``, a checkpoint of this moment, they could not load, line by line."""
        if not self._names:
            return []
        stored = {
            key.removeprefix(_PREFIX): tuple(tensor.shape)
            for key, tensor in taken.tensors.items()
            if key.startswith(_PREFIX)
        }
        stored = {name: shape for name, shape in stored.items() if name not in self._lazy}
        found = []
        if stored != self._shapes:
            others = taken.common.get("state_dict", {})
            otherwise = _otherwise(trainer.lightning_module)
            found = differences(stored, self._shapes, self._names, others, otherwise, strict=True)
        for i, (then, now) in enumerate(zip(self._optimizers or (), _groups_of(trainer), strict=False)):
            if then != now and taken.has_optimizer:
                found.append(f"optimizer {i} is {now} in the checkpoint, and was {then} when training started")
        return found


def _groups_of(trainer: pl.Trainer) -> list[str]:
    return [
        f"{type(optimizer).__name__} with groups of {', '.join(str(len(g['params'])) for g in optimizer.param_groups)} "
        "parameters"
        for optimizer in trainer.optimizers
    ]


def _otherwise(module: torch.nn.Module | None) -> tuple[str, ...]:
    return tuple(map(sharded_state.plain_name, [] if module is None else loaded_otherwise(module)))


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX
