"""First weights for a new run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port, names, sharded_state
from nemologger.checkpoint.reading.in_place import fill_special
from nemologger.checkpoint.reading.load import open_checkpoint
from nemologger.context.io_json import load_context
from nemologger.disk.there import is_dir
from nemologger.errors import CheckpointError, ModelMismatchError, NemologgerError
from nemologger.loading.compare import check_model
from nemologger.loading.optimizer_states import align_to, check

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_SHOWN = 5


class RestoreWeights(Callback):
    """Loads the weights of another run's checkpoint before the first step; not when this run resumes from its own.

    Args:
        checkpoint: The checkpoint's directory, its ``weights/``, or a ``.ckpt`` file of Lightning.
        model: Load the model's parameters and buffers.
        optimizer: Load the optimizers' state too.
    """

    def __init__(self, checkpoint: Path, *, model: bool = True, optimizer: bool = False) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.optimizer = optimizer
        self._model_is_due = model
        self._optimizer_is_due = optimizer

    @classmethod
    def attach(cls, trainer: pl.Trainer, checkpoint: Path, *, model: bool, optimizer: bool) -> None:
        """Give ``trainer`` one, in the place of an earlier one. In front: other callbacks change what it loads."""
        callbacks = lightning_port.callbacks(trainer)
        others = [callback for callback in callbacks if not isinstance(callback, cls)]
        callbacks[:] = [cls(checkpoint, model=model, optimizer=optimizer), *others]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the model as soon as it has its parameters: before they are changed (adapters) or spread over devices.

        Raises:
            ModelMismatchError: If the checkpoint belongs to a model with other parameters.
        """
        if trainer.ckpt_path is None and _is_built(pl_module):
            self._load_model(trainer, pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load what could not be loaded before: a model that is configured late, and optimizers.

        Raises:
            ModelMismatchError: If the checkpoint belongs to a model with other parameters.
            CheckpointError: If it has no optimizer state, and that was asked for.
        """
        if trainer.ckpt_path is not None:
            self._model_is_due = self._optimizer_is_due = False  # the run goes on from its own checkpoint
            return
        self._load_model(trainer, pl_module)
        if self._optimizer_is_due:
            self._load_optimizers(trainer)
            self._optimizer_is_due = False

    def _load_model(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._model_is_due:
            return
        lightning_port.settle_precision(trainer)
        strict = pl_module.strict_loading
        if strict and is_dir(self.checkpoint):
            check_model(self.checkpoint, sharded_state.model_state(trainer.strategy), pl_module)
        checkpoint = self._read(trainer, optimizer=False)
        fill_special(pl_module, checkpoint["state_dict"])
        if sharded_state.shards_state(trainer.strategy):  # it only loads what a run goes on from
            sharded_state.load_model(trainer.strategy, checkpoint["state_dict"], strict=strict)
        else:
            trainer.strategy.load_model_state_dict(checkpoint, strict=strict)
        self._model_is_due = False
        log.info("weights restored from %s", self.checkpoint)
        if not strict:
            self._say_what_was_left_out(pl_module, checkpoint)

    def _load_optimizers(self, trainer: pl.Trainer) -> None:
        checkpoint = self._read(trainer, model=False)
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(f"{self.checkpoint} holds no optimizer state: set load_optim_state=False")
        if is_dir(self.checkpoint):
            opened = open_checkpoint(self.checkpoint, verified=True)
            align_to(trainer, self.checkpoint, opened, checkpoint["optimizer_states"])
        else:
            check(trainer, self.checkpoint, checkpoint["optimizer_states"])
        if sharded_state.shards_state(trainer.strategy):
            by_number = lightning_port.optimizer_names(trainer)
            states = checkpoint["optimizer_states"]
            sharded_state.load_optimizers(trainer.strategy, states, trainer.optimizers, by_number)
        else:
            trainer.strategy.load_optimizer_state_dict(checkpoint)

    def _read(self, trainer: pl.Trainer, *, model: bool = True, optimizer: bool = True) -> dict[str, Any]:
        """The checkpoint; if it is a directory, without what is not asked for."""
        strategy = trainer.strategy
        sharded = sharded_state.shards_state(strategy)
        if is_dir(self.checkpoint):
            opened = open_checkpoint(self.checkpoint, verified=True)  # by AutoResume
            if sharded:
                return opened.read(sharded_state.templates(strategy), model=model, optimizer=optimizer)
            into = trainer.lightning_module if lightning_port.loads_model_as_is(strategy) else None
            return opened.read(into=into, model=model, optimizer=optimizer)
        if not sharded:
            return self._checked(strategy.load_checkpoint(str(self.checkpoint), weights_only=True))
        whole = strategy.checkpoint_io.load_checkpoint(str(self.checkpoint), map_location="cpu", weights_only=True)
        self._checked(whole)
        return sharded_state.scatter(strategy, whole, lightning_port.optimizer_names(trainer))

    def _checked(self, loaded: Any) -> dict[str, Any]:
        if isinstance(loaded, dict) and "state_dict" in loaded:
            return loaded
        raise CheckpointError(
            f"{self.checkpoint} has no 'state_dict', as a checkpoint of Lightning has. If it holds weights alone, load them "
            "into the model in your program: model.load_state_dict(torch.load(path))"
        )

    def _say_what_was_left_out(self, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        wanted, stored = set(pl_module.state_dict()), set(checkpoint["state_dict"])
        if not wanted & stored:
            raise ModelMismatchError(f"{self.checkpoint} and the model have no parameter of the same name")
        for what, left in (("not in the checkpoint", wanted - stored), ("not in the model", stored - wanted)):
            if left:
                log.warning("%d parameters of %s were left out, %s: %s", len(left), self.checkpoint, what, _few(left))


def restore_tokenizer(model: pl.LightningModule | None, checkpoint: Path) -> None:
    """Give ``model`` the tokenizer of the checkpoint's context, if it has that attribute. What is refused is named."""
    if model is None or not hasattr(model, "tokenizer") or not is_dir(checkpoint / names.CONTEXT):
        return
    try:
        model.tokenizer = load_context(checkpoint, subpath="model.tokenizer")
    except (NemologgerError, AttributeError) as error:
        log.warning("the tokenizer of %s was not restored: %s", checkpoint, error)


def _is_built(module: pl.LightningModule) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.is_meta for parameter in parameters)


def _few(left: set[str]) -> str:
    shown = sorted(left)[:_SHOWN]
    return ", ".join(shown) + (", …" if len(left) > len(shown) else "")
