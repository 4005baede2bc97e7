"""What a checkpoint is made of, and where Lightning has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.model_helpers import is_overridden

from nemologger import sharded_state
from nemologger.lightning_port.hooks import callbacks

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint is made of, taken between two steps. The tensors are the live ones.

    Attributes:
        checkpoint: Lightning's checkpoint dictionary: model, loops, callbacks, optimizers, schedulers, hyperparameters.
        parameter_names: The keys of ``checkpoint["state_dict"]`` that are parameters. The others are buffers, which may
            differ between the ranks of data-parallel training.
        optimizer_names: For each optimizer, the parameter name behind each index of its state.
        trained_names: The parameters that an optimizer trains. Others may be averages of these, made in any step.
    """

    checkpoint: dict[str, Any]
    parameter_names: frozenset[str]
    optimizer_names: list[dict[int, str]]
    trained_names: frozenset[str]


class KeepsWeights(Callback):
    """A callback whose ``on_save_checkpoint`` adds weights: it is called for checkpoints of weights alone, too."""

    def before_save(self, trainer: pl.Trainer) -> None:
        """Do what is collective of that: no hook of the user's, which may raise on some ranks, was called yet."""


def training_state(trainer: pl.Trainer, *, weights_only: bool) -> TrainingState:
    """Lightning's checkpoint of this moment. Collective: user hooks that run on every rank are called here."""
    with sharded_state.kept_in_place(trainer.strategy, optimizers=not weights_only):
        keepers = [callback for callback in callbacks(trainer) if isinstance(callback, KeepsWeights)]
        for callback in keepers:
            callback.before_save(trainer)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        if weights_only:  # Lightning asks no callback then
            for callback in keepers:
                callback.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
    named = _named_parameters(trainer)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}
    return TrainingState(
        checkpoint,
        frozenset(named),
        optimizer_names(trainer),
        frozenset(name for name, parameter in named.items() if id(parameter) in trained),
    )


def optimizer_names(trainer: pl.Trainer) -> list[dict[int, str]]:
    """For each optimizer, the parameter name behind each index of its state."""
    buffers = dict(trainer.lightning_module.named_buffers())
    by_id = {
        id(parameter): _unpruned(name, buffers) for name, parameter in reversed(_named_parameters(trainer).items())
    }
    names = []
    for optimizer in trainer.optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names.append({i: by_id[id(p)] for i, p in enumerate(parameters) if id(p) in by_id})
    return names


def _unpruned(name: str, buffers: dict[str, torch.Tensor]) -> str:
    """What a parameter is called before torch prunes it, and again in a fresh model and in ModelPruning's checkpoints."""
    plain = name.removesuffix("_orig")
    return plain if plain != name and f"{plain}_mask" in buffers else name


def _named_parameters(trainer: pl.Trainer) -> dict[str, torch.nn.Parameter]:
    named = trainer.lightning_module.named_parameters(remove_duplicate=False)
    return {sharded_state.plain_name(name): parameter for name, parameter in named}


def checkpoint_directory(trainer: pl.Trainer, checkpoint: ModelCheckpoint) -> str:
    """Where ``checkpoint`` will write, before a fit has settled it."""
    return str(checkpoint._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


def saves_itself(data: pl.LightningDataModule) -> bool:
    """Whether ``data`` has state of its own for checkpoints."""
    return is_overridden("state_dict", data)


def saves_more(module: pl.LightningModule) -> bool:
    """Whether ``module`` puts something of its own into checkpoints."""
    return is_overridden("on_save_checkpoint", module)


def zeroes_by_hand(module: pl.LightningModule) -> bool:
    """Whether ``module`` decides itself when gradients are zeroed, and so how long they are summed up."""
    return not module.automatic_optimization or is_overridden("optimizer_zero_grad", module)


def hyperparameters(holder: object) -> Any:
    """Those that ``holder`` has saved, the very dictionary or configuration of another kind; None if it has none."""
    return getattr(holder, "_hparams", None) if isinstance(holder, HyperparametersMixin) else None


def names_of_lightning() -> frozenset[str]:
    """The attributes of modules and data modules that are not the program's."""
    hyperparameters = {"_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams"}
    return frozenset({*vars(LightningModule()), *vars(LightningDataModule()), *hyperparameters})
