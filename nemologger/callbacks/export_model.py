"""One file with the model in it, for other programs."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port, sharded_state
from nemologger.checkpoint.reading.load import open_checkpoint
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.context.uncaptured import class_of
from nemologger.disk.there import is_file
from nemologger.errors import ConfigurationError, NotFoundError
from nemologger.export import FORMATS, export_weights
from nemologger.loading.checkpoint_io import place_of
from nemologger.ranks import SingleProcess, decide
from nemologger.saving.kept_checkpoints import ours
from nemologger.stores.remote_disk import RemoteDisk, disk_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

    from nemologger.ranks import Ranks

log = logging.getLogger(__name__)

_CHUNK = 16 << 20


class ExportModel(IOMixin, Callback):
    """Writes the model beside its checkpoints as ``<prefix><postfix>``, when training has ended.

    The weights are those of a checkpoint, so there must be a ``nemologger.ModelCheckpoint``. A ``postfix`` that
    :func:`~nemologger.export_weights` knows (``.safetensors``, ``.pt``, …) works for any model. For any other, the model is
    asked to write the file itself, with its method ``save_to(save_path=...)``, as NeMo's models do for ``.nemo``; if the
    checkpoints are in an object store, to a temporary file that rank 0 then puts there.

    Args:
        prefix: What the file is called.
        postfix: How its name ends, and what is written.
        best: Export the best checkpoint rather than the last one. The model in memory stays as it is.
        always: Also export whenever there is another such checkpoint.
        at_end: Export when training has ended.

    Raises:
        ConfigurationError: Neither ``always`` nor ``at_end``, or there is nothing to call the file; before training, if
            there is no ``nemologger.ModelCheckpoint``.

    Example:
        >>> ExportModel("digits", ".safetensors", best=True).postfix
        '.safetensors'
    """

    def __init__(
        self,
        prefix: str = "model",
        postfix: str = ".safetensors",
        *,
        best: bool = False,
        always: bool = False,
        at_end: bool = True,
    ) -> None:
        if not holds(lambda: prefix + postfix and "/" not in prefix + postfix):
            raise ConfigurationError(
                f"ExportModel(prefix={prefix!r}, postfix={postfix!r}): they make the name of one file"
            )
        if (prefix + postfix).endswith(".ckpt"):
            raise ConfigurationError(
                f"ExportModel(prefix={prefix!r}, postfix={postfix!r}): a .ckpt file would be taken for a checkpoint to "
                "resume from; '.pt' has the same content"
            )
        if not (always or at_end):
            raise ConfigurationError("ExportModel(always=False, at_end=False) never exports anything")
        self.prefix = prefix
        self.postfix = postfix
        self.best = best
        self.always = always
        self.at_end = at_end
        self._exported = ""
        self._ranks: Ranks = SingleProcess()

    @property
    def _is_weights_file(self) -> bool:
        return Path(self.prefix + self.postfix).suffix in FORMATS

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say now what will not happen later."""
        if stage != "fit" or lightning_port.is_trial(trainer):
            return
        if not ours(trainer):
            raise ConfigurationError(
                "ExportModel exports what a nemologger.ModelCheckpoint has saved, and the trainer has none"
            )
        self._ranks = lightning_port.connect_as_patiently(trainer)  # they wait while rank 0 writes the file
        if not self._is_weights_file and not callable(getattr(pl_module, "save_to", None)) and trainer.is_global_zero:
            log.warning(
                "no %s is going to be written: %s has no method save_to(). Every checkpoint holds its weights; to have them "
                "in one file, choose the postfix '.safetensors' or '.pt'; exp_manager calls that "
                "checkpoint_callback_params.postfix, and save_nemo_on_train_end=False asks for no file.",
                self.prefix + self.postfix,
                class_of(pl_module).__name__,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """With ``always``, export a checkpoint that is new."""
        if self.always:
            self._export(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With ``always``, export a checkpoint that is new."""
        if self.always and not trainer.sanity_checking:
            self._export(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export; the last checkpoint is there now."""
        if self.at_end:
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        save_to = getattr(module, "save_to", None)
        if lightning_port.is_trial(trainer) or not (self._is_weights_file or callable(save_to)):
            return
        source = decide(self._ranks, lambda: self._source(trainer))
        if not source or source == self._exported:
            return
        self._exported = source
        checkpoint = place_of(trainer, source)
        target = checkpoint.parent / (self.prefix + self.postfix)
        if self._is_weights_file:
            decide(self._ranks, lambda: str(export_weights(checkpoint, target)))
        else:
            self._let_model_save(trainer, module, checkpoint, target)
        if trainer.is_global_zero:
            log.info("%s: the model of %s", target, source)

    def _source(self, trainer: pl.Trainer) -> str:
        callback = ours(trainer)[0]
        last = callback.newest
        source = (callback.best_model_path or last) if self.best else last or callback.best_model_path
        if source != self._exported:
            callback.finish_removals()
        return source

    def _let_model_save(self, trainer: pl.Trainer, module: pl.LightningModule, source: Path, target: Path) -> None:
        """All ranks: the model knows which of them write."""
        strategy = trainer.strategy
        sharded_state.reshard(strategy)  # what a forward has put together would outlive what is loaded now
        template = [sharded_state.templates(strategy)] if sharded_state.shards_state(strategy) else []
        weights = open_checkpoint(source).read(*template, optimizer=False)["state_dict"]
        live = sharded_state.model_state(strategy)
        current = {name: value.detach().clone() for name, value in live.items() if _is_tensor(value)}
        disk = disk_of(target)
        with ExitStack() as stack:
            place = target
            if disk is not None:  # such models write local files
                place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nemologger-")), target.name)
            try:
                _load(strategy, weights)
                module.save_to(save_path=str(place))  # type: ignore[operator]  # the caller has looked
            finally:
                sharded_state.reshard(strategy)
                _load(strategy, current)
            if disk is not None:
                decide(self._ranks, lambda: _upload(disk, place, target))


def _load(strategy: Strategy, state: dict[str, Any]) -> None:
    if sharded_state.shards_state(strategy):  # it only loads what a run goes on from
        sharded_state.load_model(strategy, state, strict=False)
    else:
        strategy.load_model_state_dict({"state_dict": state}, strict=False)


def _upload(disk: RemoteDisk, file: Path, target: Path) -> None:
    if not is_file(file):
        raise NotFoundError(f"save_to(save_path={str(file)!r}) has left no file there, which was to go to {target}")
    with file.open("rb") as content:
        disk.write(target, iter(lambda: content.read(_CHUNK), b""))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
