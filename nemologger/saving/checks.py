"""What can be said against saves before the first of them: a metric that never appears, tensors that cannot be written."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, Timer, WeightAveraging
from torch.distributed.fsdp import FlatParameter

from nemologger import lightning_port, sharded_state
from nemologger.checkpoint.reading.in_place import loaded_otherwise
from nemologger.checkpoint.state.snapshot import check_form
from nemologger.condition import kind_of
from nemologger.disk.there import exists
from nemologger.errors import CheckpointError, ConfigurationError
from nemologger.ranks import decide
from nemologger.saving.monitor import is_meant_for_validation, is_of_validation, why_it_cannot_appear

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from nemologger.checkpoint.keeping.shelf import Shelf
    from nemologger.disk import Disk
    from nemologger.ranks import Ranks

log = logging.getLogger("nemologger.model_checkpoint")

#: How long, in seconds, a network file system may take to show all nodes what one has written.
_UNTIL_SEEN = 15.0

#: What says when all ranks come together.
_OF_CHECKPOINT = (
    "_every_n_train_steps",
    "_every_n_epochs",
    "_train_time_interval",
    "_save_on_train_epoch_end",
    "async_save",
    "on_busy",
    "save_last",
    "save_on_exception",
    "save_weights_only",
)
_OF_TRAINER = ("max_steps", "max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval")


def check_trainer(trainer: object, wanted_by: str) -> None:
    """Refuse what is no Trainer of ``lightning.pytorch``, which alone has the parts that are looked into.

    Raises:
        ConfigurationError: It is none; the message says what it is.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"{wanted_by}: the trainer is {kind_of(trainer)}, expected a lightning.pytorch.Trainer, for example "
            "nemologger.Trainer(...). (Fabric has no training loop.)"
        )


def check_monitor(trainer: pl.Trainer, callbacks: Sequence[Callback], monitor: str | None) -> None:
    """Refuse a monitor that can never be logged while ``trainer`` runs with ``callbacks``.

    Raises:
        ConfigurationError: No validation takes place before training ends.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # it saves nothing
        return
    max_epochs = trainer.max_epochs
    if max_epochs is None and any(isinstance(callback, Timer) for callback in callbacks):
        max_epochs = -1
    why = why_it_cannot_appear(
        monitor,
        max_epochs=max_epochs,
        max_steps=trainer.max_steps,
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        val_check_interval=trainer.val_check_interval,
        limit_val_batches=trainer.limit_val_batches,
        limit_train_batches=trainer.limit_train_batches,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
    )
    if why is not None:
        raise ConfigurationError(
            f"ModelCheckpoint(monitor={monitor!r}): this metric can never appear: {why}. Let validation run "
            "sooner, train for longer, or monitor a training metric."
        )


def check_validation(trainer: pl.Trainer, monitor: str | None) -> None:
    """Refuse a metric of validation in a fit that has none.

    Raises:
        ConfigurationError: There is no ``validation_step``, or no data for it.
    """
    if is_of_validation(monitor) and not lightning_port.has_validation(trainer):
        raise ConfigurationError(
            f"ModelCheckpoint(monitor={monitor!r}): this metric can never appear: there is no validation_step, or no "
            "validation data (nemologger.train takes both loaders in a LightningDataModule). Add them, or monitor a "
            "training metric, or set monitor=None to keep the newest."
        )


def check_tried_validation(trainer: pl.Trainer, monitor: str | None) -> None:
    """Warn of a metric of validation that the few batches before training have not logged: it may be a typo.

    No error: who logs it may leave these batches out.
    """
    metrics = trainer.callback_metrics
    if not is_meant_for_validation(monitor, metrics) or monitor in metrics or not trainer.is_global_zero:
        return
    log.warning(
        "ModelCheckpoint(monitor=%r): validation was tried before training, and logged %s, but no such metric. Where it is "
        "not logged later either, the run ends with an error at the first save after a validation.",
        monitor,
        sorted(metrics),
    )


def check_scratch(trainer: pl.Trainer, shelf: Shelf, directory: str) -> None:
    """Warn if a run that starts from scratch is about to replace the checkpoints of an earlier one."""
    if trainer.is_global_zero and shelf.kept and lightning_port.position(trainer) == (0, 0) and not trainer.ckpt_path:
        log.warning(
            "%s holds checkpoints of an earlier run, up to step %d, and this one starts from scratch: they give way to "
            "its own. To go on from them, stop it and set AutoResume(resume_if_exists=True); to keep them, give it "
            "another version.",
            directory,
            shelf.newest_step,
        )


def check_final_weights(trainer: pl.Trainer) -> None:
    """Warn if what is about to be saved when training has ended is no place to go on from exactly.

    Lightning's averages have taken the place of the weights by then, which is what most want of a finished run.
    """
    averages = (StochasticWeightAveraging, WeightAveraging)
    names = [type(one).__name__ for one in lightning_port.callbacks(trainer) if isinstance(one, averages)]
    if names and trainer.is_global_zero:
        log.warning(
            "the last checkpoint is saved behind the end of training, when %s has put its averages in the place of the "
            "weights: a run that is given more epochs goes on from the averages. Saved with every_n_epochs=1, or at the "
            "last step, it goes on from the weights.",
            " and ".join(names),
        )


def check_interval(trainer: pl.Trainer, monitor: str | None) -> None:
    """As :func:`check_monitor`, when training starts and the length of an epoch is known.

    Raises:
        ConfigurationError: Training ends before validation runs.
    """
    every = trainer.val_check_batch
    if not is_of_validation(monitor) or trainer.check_val_every_n_epoch is not None or every is None:
        return
    batches = float("inf")
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        batches = trainer.num_training_batches * trainer.max_epochs
    if trainer.max_steps != -1:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    if batches < every < float("inf"):
        raise ConfigurationError(
            f"ModelCheckpoint(monitor={monitor!r}): validation runs every {every} batches, but training ends after "
            f"{batches:g}"
        )


def check_first_save(trainer: pl.Trainer, why_seldom: Sequence[str | None]) -> None:
    """Warn if nothing saves before training ends, or more seldom than it says, when training starts.

    Args:
        trainer: It knows how many batches an epoch has.
        why_seldom: What each ModelCheckpoint says of that; None if it saves.
    """
    if None not in why_seldom and trainer.is_global_zero and lightning_port.position(trainer) == (0, 0):
        log.warning(
            "ModelCheckpoint: %s. A run that is killed before it saves has nothing to go on from: set "
            "every_n_train_steps=... or train_time_interval=... to save sooner",
            why_seldom[0],
        )


def check_state(trainer: pl.Trainer) -> None:
    """Refuse a model that no checkpoint could hold, when training starts.

    Raises:
        CheckpointError: It has tensors that cannot be saved.
        ConfigurationError: Its parameters have no names.
    """
    if sharded_state.flattened(trainer.strategy) is None:  # FSDP makes tensors of its own
        state = sharded_state.model_state(trainer.strategy)
        check_form(state, "state_dict.")
        _check_nested(state, trainer.lightning_module)
    elif any(isinstance(parameter, FlatParameter) for parameter in trainer.lightning_module.parameters()):
        raise ConfigurationError(
            "FSDPStrategy(use_orig_params=False) leaves parameters no names of their own, so no run could go on from its "
            "checkpoints. Leave use_orig_params at True, which is Lightning's default, or use nemologger's FSDP2Strategy."
        )


def _check_nested(state: Mapping[str, Any], module: torch.nn.Module) -> None:
    """Refuse nested tensors: ``load_state_dict`` of torch takes none."""
    otherwise = tuple(loaded_otherwise(module))
    nested = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.is_nested]
    refused = [key for key in nested if not key.startswith(otherwise)]
    if refused:
        raise CheckpointError(
            f"state_dict.{refused[0]} is a nested tensor, which torch's load_state_dict() cannot load, so no run could go "
            "on from its checkpoints: register_buffer(..., persistent=False), or keep its parts as tensors of their own"
        )


def check_ranks(ranks: Ranks, trainer: pl.Trainer, checkpoint: ModelCheckpoint) -> None:
    """Refuse ranks that would save, validate or stop at different steps: they would wait for each other there. Collective.

    Raises:
        ConfigurationError: On every rank; it names what differs.
    """
    of_checkpoint = {name: getattr(checkpoint, name) for name in _OF_CHECKPOINT}
    of_trainer = {name: getattr(trainer, name) for name in _OF_TRAINER}
    mine = {
        **{f"ModelCheckpoint({name.lstrip('_')}=...)": repr(value) for name, value in of_checkpoint.items()},
        **{f"Trainer({name}=...)": repr(value) for name, value in of_trainer.items()},
    }

    def differing(settings: list[dict[str, str]]) -> list[str]:
        first, found = settings[0], []
        for name in first:
            rank = next((rank for rank, other in enumerate(settings) if other[name] != first[name]), None)
            if rank is not None:
                found.append(f"{name} is {first[name]} on rank 0 and {settings[rank][name]} on rank {rank}")
        return found

    found = ranks.exchange(mine, differing)
    if found:
        raise ConfigurationError(
            f"all ranks need the same settings, and wait for each other otherwise: {'; '.join(found)}"
        )


def check_lengths(ranks: Ranks, trainer: pl.Trainer) -> None:
    """Warn of ranks with epochs of different lengths: they wait for each other in every step. Collective.

    No error: the run may stop before.
    """
    if ranks.world_size == 1:
        return

    def extremes(lengths: list[float]) -> tuple[float, int, float, int]:
        fewest, most = min(lengths), max(lengths)
        return fewest, lengths.index(fewest), most, lengths.index(most)

    fewest, short, most, long = ranks.exchange(trainer.num_training_batches, extremes)
    if fewest != most and trainer.is_global_zero:
        log.warning(
            "an epoch has %s batches on rank %d and %s on rank %d: the ranks wait for each other in every step, and the run "
            "will end with an error when one has no more. Give all as many, or set Trainer(limit_train_batches=%s)",
            fewest,
            short,
            most,
            long,
            fewest,
        )


def check_shared(ranks: Ranks, disk: Disk, directory: Path) -> None:
    """Refuse a directory that some rank does not see: each of them writes its part of every checkpoint there. Collective.

    Args:
        ranks: The processes.
        disk: Where ``directory`` is.
        directory: It is there on rank 0.

    Raises:
        ConfigurationError: On every rank; it names one that does not see it.
    """
    if ranks.world_size == 1 or not disk.can_rename:
        return

    def make() -> str:
        probe = directory / f".{secrets.token_hex(8)}.partial"
        disk.write(probe, [b""])
        return probe.name

    probe = directory / decide(ranks, make)
    if ranks.rank:
        # A host of NFS that has looked for the directory before it was made remembers for a minute that there is none. Told
        # to make it, it asks.
        with contextlib.suppress(OSError):
            disk.make_directory(directory)
    end = time.monotonic() + _UNTIL_SEEN
    while not (seen := exists(probe)) and time.monotonic() < end:
        time.sleep(0.1)

    def blind(all_seen: list[tuple[str, bool]]) -> str:
        rank = next((rank for rank, (_, seen) in enumerate(all_seen) if not seen), None)
        return (
            "" if rank is None else f"rank {rank} on {all_seen[rank][0]} does not see what rank 0 on {all_seen[0][0]}"
        )

    found = ranks.exchange((socket.gethostname(), seen), blind)
    decide(ranks, lambda: disk.remove(probe))
    if found:
        raise ConfigurationError(
            f"{found} writes to {directory}. All ranks write to each checkpoint: dirpath must be on a file system that "
            "they share"
        )
