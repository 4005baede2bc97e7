"""The states of optimizers from a checkpoint, in the order of those that a run has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemologger import lightning_port, sharded_state
from nemologger.checkpoint.reading.load import Opened
from nemologger.checkpoint.state.optimizers import align, check_sizes, keep_as_saved
from nemologger.errors import ModelMismatchError

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


def align_to(trainer: pl.Trainer, directory: Path, opened: Opened, states: list[dict[str, Any]]) -> None:
    """Bring ``states``, the optimizers' of the checkpoint ``directory``, into the order of the trainer's optimizers.

    Raises:
        ModelMismatchError: If those are other optimizers, or hold other parameters.
    """
    saved = opened.optimizer_names
    if len(saved) != len(states):
        check(trainer, directory, states)
        return  # another tool wrote it: the order is all there is
    now = lightning_port.optimizer_names(trainer)
    if len(states) not in (0, len(now)):
        raise ModelMismatchError(
            f"{directory} holds the state of {len(states)} optimizers, this run has {len(now)}: configure them as in "
            "the run that saved it, or start a new run from its weights with RestoreConfig"
        )
    schedules = len(opened.common.get("lr_schedulers", ()))
    says = trainer.is_global_zero and not lightning_port.averages_were_taken(trainer)  # with rates of its own
    if states and schedules > len(trainer.lr_scheduler_configs) and says:
        log.warning(
            "%s holds the state of %d LR schedulers, this run has %d: the rest is dropped, and the learning rate begins as "
            "it was saved",
            directory,
            schedules,
            len(trainer.lr_scheduler_configs),
        )
    for i, (state, optimizer) in enumerate(zip(states, trainer.optimizers, strict=False)):
        groups = optimizer.state_dict().get("param_groups", [])
        if not (state or groups):
            continue  # of a module without an optimizer: Lightning's stand-in for one
        try:
            states[i] = align(state or {"param_groups": []}, saved[i], groups, now[i], optimizer.defaults)
        except ModelMismatchError as error:
            raise ModelMismatchError(f"{directory}, optimizer {i}: {error}") from error
        if "param_groups" in states[i] and not sharded_state.shards_state(trainer.strategy):
            keep_as_saved(optimizer, states[i], partial(_dtype_in, opened.shapes, saved[i]))
    check(trainer, directory, states)


def check(trainer: pl.Trainer, source: str | Path, states: Sequence[Mapping[str, Any]]) -> None:
    """Look whether the trainer's optimizers can work with ``states``, those of the checkpoint ``source``, in their order.

    Raises:
        ModelMismatchError: If they would write to memory that is not theirs.
    """
    if sharded_state.flattened(trainer.strategy) is not None:
        return  # FSDP gives its optimizers, whose parameters are parts of one row, what it makes of that
    names = lightning_port.optimizer_names(trainer)
    for i, (state, optimizer, name_of) in enumerate(zip(states, trainer.optimizers, names, strict=False)):
        try:
            check_sizes(optimizer, state, name_of)
        except ModelMismatchError as error:
            raise ModelMismatchError(f"{source}, optimizer {i}: {error}") from error


def _dtype_in(
    stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]], names_of: Mapping[int, str], index: int
) -> torch.dtype | None:
    """That of a parameter in a checkpoint, by its index in an optimizer."""
    _, dtype = stored.get(f"state_dict.{names_of.get(index)}", (None, None))
    return dtype
