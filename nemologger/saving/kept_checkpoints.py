"""What one checkpoint callback keeps, what it calls it, and what Lightning sees of that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint as LightningModelCheckpoint

from nemologger import lightning_port, names
from nemologger.checkpoint.find import survey
from nemologger.checkpoint.keeping.keeper import Keeper
from nemologger.checkpoint.keeping.naming import format_name
from nemologger.checkpoint.keeping.retention import Policy
from nemologger.checkpoint.keeping.shelf import Shelf, look
from nemologger.checkpoint.writing.staging import StagingMode
from nemologger.context.uncaptured import class_of
from nemologger.disk import Disk
from nemologger.disk.lock import DirectoryLock
from nemologger.errors import ConfigurationError
from nemologger.ranks import Ranks
from nemologger.saving.first_save import why_seldom_saved
from nemologger.stores.client import ADVICE, before_training
from nemologger.stores.owner import StoreOwner
from nemologger.stores.path import in_store
from nemologger.stores.remote_disk import RemoteDisk

if TYPE_CHECKING:
    import lightning.pytorch as pl


class KeptCheckpoints(LightningModelCheckpoint):
    """The part of ModelCheckpoint that knows which checkpoints there are; when to save is its own.

    Everything here follows from the manifests on disk. Lightning's attributes (``best_model_path`` and so on) reflect it.
    """

    consumed_samples: int
    _of_saver: dict[str, Any] | None = None
    given_directory: Path | None  # as ``dirpath`` was given
    files_per_rank: int
    save_last_n_optim_states: int
    save_on_sigterm: bool
    _disk: Disk
    _ranks: Ranks
    _keeper: Keeper
    _lock: DirectoryLock | StoreOwner | None
    _counted_here: int
    _metrics: dict[str, float]
    _saves = False  # the checkpoint that is being made is this one's
    _saved_at = (0, 0)  # the position that has its checkpoint
    _restored_metrics: dict[str, float]

    def save_now(self, trainer: pl.Trainer) -> None:
        """Save what the run needs to go on from this moment, and return when it is durable. Collective.

        For a callback that is about to stop the run, in ``on_train_batch_end`` after an optimizer step or in
        ``on_validation_end``, behind the others. What is being saved beside training is waited for; a step that has its
        checkpoint is not saved again. Without ``save_last`` there is a ``-last`` all the same if this moment is not among
        the best, and it goes with the next save. What the module does in its own ``on_train_batch_end`` or
        ``on_validation_end`` comes later, and is not in it; ``nemologger.callbacks.MaxTimePerRun`` and
        ``PreemptionCallback`` stop behind it.

        Args:
            trainer: The trainer.

        Raises:
            SaveFailedError: On every rank, if it could not be saved.
        """
        raise NotImplementedError

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        """How other callbacks save before they stop a run (those of NeMo and of nvidia-resiliency-ext)."""
        self.save_now(trainer)

    def finish_removals(self) -> None:
        """Before reading a checkpoint while training goes on: wait until none is about to give up its optimizer state.

        On rank 0, whose business that is; there is nothing to wait for on others.
        """
        self._keeper.finish_removals()

    @property
    def busy(self) -> bool:
        """Whether a save is under way beside training: what this callback does next may wait for the disk."""
        return self._keeper.busy

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint that is kept, ``-last`` if there is one; empty without any. On rank 0."""
        newest = max(self.shelf.kept, key=lambda kept: kept.order, default=None)
        return self.shelf.last or (newest.path if newest is not None else "")

    @property
    def _policy(self) -> Policy:
        return Policy(self.save_top_k, self.mode, self.monitor is not None, self.save_last_n_optim_states)

    @property
    def _owner(self) -> dict[str, str | None]:
        return {"monitor": self.monitor, "mode": self.mode, "key": self.state_key}

    def _forget(self) -> None:
        """Nothing of a fit of another trainer, which this object has served before, counts in the one that begins."""
        self.consumed_samples = self._counted_here = 0
        self._metrics, self._restored_metrics = {}, {}
        self._saved_at, self._last_checkpoint_saved = (0, 0), ""

    def _look(self, trainer: pl.Trainer) -> Shelf:
        directory = self._disk.path(str(self.dirpath))
        advice = (
            ADVICE if in_store(directory) else "Give a directory that is there, or can be made, and can be written to"
        )
        try:
            self._disk.make_directory(directory)
            if isinstance(self._disk, RemoteDisk):
                self._disk.try_out(directory)  # an hour of training would be lost at the first save
            if (remote := in_store(directory)) is not None:
                self._lock = StoreOwner(remote)
                self._lock.take()
        except OSError as error:
            raise ConfigurationError(
                f"dirpath={str(directory)!r} cannot be used: {error.strerror}. {advice}"
            ) from error
        if self._disk.can_rename:
            self._lock = DirectoryLock(directory)
            self._lock.take()
        twins = [c for c in ours(trainer) if (c.dirpath, c.monitor, c.mode) == (self.dirpath, self.monitor, self.mode)]
        with before_training(f"What earlier runs have left in {directory}"):
            return look(self._disk, directory, self._owner, alone=len(twins) == 1)

    @property
    def shelf(self) -> Shelf:
        """What is kept now."""
        return self._keeper.shelf

    def _reflect(self) -> None:
        """Set Lightning's attributes to what is on disk."""
        shelf = self.shelf
        self.last_model_path = shelf.last
        ranking = self._policy.ranking(shelf.kept)
        scores = {k.path: torch.tensor(float("nan") if k.score is None else k.score) for k in ranking}
        self.best_k_models = scores if self.monitor is not None else {}
        self.best_model_path = ranking[0].path if ranking else ""
        self.best_model_score = scores[ranking[0].path] if ranking and self.monitor is not None else None
        self.kth_best_model_path = ranking[-1].path if ranking else ""
        self.current_score = None
        if ranking:
            self.kth_value = scores[ranking[-1].path]
            self.current_score = scores[max(ranking, key=lambda k: k.order).path]

    def _keep(self, shelf: Shelf, *, beside: bool, staging: StagingMode = "auto") -> Keeper:
        link = self.save_last == "link"
        return Keeper(
            self._disk,
            self._ranks,
            self._policy,
            link=link,
            shelf=shelf,
            files_per_rank=self.files_per_rank,
            beside=beside,
            staging=staging,
        )

    def why_seldom(self, trainer: pl.Trainer) -> str | None:
        """See :func:`why_seldom_saved`, when training starts."""
        by_hand = not trainer.lightning_module.automatic_optimization  # a batch may take several steps, or none
        val_check_batch = trainer.val_check_batch
        if val_check_batch is None or self._train_time_interval is not None or (by_hand and self._every_n_train_steps):
            return None
        return why_seldom_saved(
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            max_epochs=trainer.max_epochs,
            max_steps=-1 if by_hand else trainer.max_steps,
            epoch=trainer.num_training_batches,
            validates=lightning_port.has_validation(trainer) and not self._save_on_train_epoch_end,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            val_check_batch=val_check_batch,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
        )

    def _needed_by_others(self, trainer: pl.Trainer) -> set[str]:
        """What another checkpoint callback of this trainer keeps."""
        return {path for other in ours(trainer) if other is not self for path in other.shelf.needed}

    def _paths_of(self, checkpoint: str | Path | None) -> set[str]:
        """The ways to write the path of a checkpoint in the directory; it may also be anywhere else."""
        if not checkpoint or (not self._disk.can_rename and not str(checkpoint).startswith(f"{self.dirpath}/")):
            return set()
        path = self._disk.path(str(checkpoint)).absolute()
        path = path.parent if path.name == names.WEIGHTS else path
        return {str(path), str(path.resolve())}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of this callback. What is kept where is read from the manifests instead."""
        return {
            **super().state_dict(),
            "dirpath": str(self.dirpath),
            "consumed_samples": self.consumed_samples,
            "metrics": self._metrics,
            "saves": self._saves,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; the bookkeeping of checkpoints comes from the directory itself."""
        # Whose checkpoint it is knows better than one that has saved last before that.
        state_dict, self._of_saver = self._of_saver or state_dict, None
        self.consumed_samples = int(state_dict.get("consumed_samples", 0))
        self._restored_metrics = dict(state_dict.get("metrics", {}))
        self._counted_here = 0

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The step that is being restored needs no saving again.

        Lightning hands the state only to a callback of the same interval and metric: what was counted goes on all the same.
        """
        self._saved_at = lightning_port.position_in(checkpoint, pl_module)
        states = checkpoint.get("callbacks", {})
        ours = [s for s in states.values() if isinstance(s, dict) and {"dirpath", "consumed_samples"} <= s.keys()]
        # In older ones nobody says who has made it: who has counted most, then.
        self._of_saver = max(ours, key=lambda s: (s.get("saves", False), int(s["consumed_samples"])), default=None)
        if self.state_key not in states and ours:
            self.load_state_dict({})

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """For ``fit(ckpt_path="last")``.

        Raises:
            ConfigurationError: If they are in a store: Lightning would look for a file there, and start from scratch.
        """
        if not self._disk.can_rename:
            raise ConfigurationError(
                f'ckpt_path="last" cannot be used with dirpath={str(self.dirpath)!r}: '
                "AutoResume(resume_if_exists=True).setup(trainer) finds the newest checkpoint there"
            )
        if not self.last_model_path:
            directory = self._disk.path(lightning_port.checkpoint_directory(trainer, self))
            complete = [f for f in survey(directory) if f.manifest is not None]
            newest = max(complete, key=lambda f: f.manifest.order if f.manifest else (), default=None)
            return {str(newest.path)} if newest else set()
        return {self.last_model_path}

    # --- names ----------------------------------------------------------------------------------------------------

    def _path(self, trainer: pl.Trainer, metrics: dict[str, float]) -> Path:
        values = self._values(trainer, metrics)
        template = self.filename or "{epoch}-{step}"
        name = format_name(template, values, insert_names=self.auto_insert_metric_name)
        path = self._disk.path(str(self.dirpath)) / name
        taken = self._needed_by_others(trainer)
        if {str(path), str(path) + names.LAST} & taken:  # as long as a metric is missing, two templates can agree
            path = path.with_name(f"{name}-{str(self.monitor).replace('/', '_')}")
        return path

    def _values(self, trainer: pl.Trainer, metrics: dict[str, float]) -> dict[str, float | str]:
        """What a name may hold."""
        return {
            **metrics,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "consumed_samples": self.consumed_samples,
            "model_name": class_of(trainer.lightning_module).__name__,
        }

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """The path of a checkpoint with these metrics."""
        template = filename or self.filename or "{epoch}-{step}"
        values = {"epoch": 0, "step": 0, **floats(metrics)}
        values.update({key: int(values[key]) for key in ("epoch", "step")})
        name = format_name(template, values, insert_names=self.auto_insert_metric_name)
        name = f"{prefix}-{name}" if prefix else name
        return str(self._disk.path(str(self.dirpath)) / name) if self.dirpath else name

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_disk(self) -> None:
        if self.save_last_n_optim_states != -1 and not self._disk.can_rename:
            raise ConfigurationError(
                f"ModelCheckpoint(save_last_n_optim_states={self.save_last_n_optim_states}, dirpath={str(self.dirpath)!r}): "
                "an object store renames nothing, so no checkpoint there can be replaced by one without optimizer state. "
                "Leave it at -1; to save room lower save_top_k"
            )

    def _check_neighbours(self, trainer: pl.Trainer) -> None:
        for other in ours(trainer):
            if other is not self and (other.dirpath, other.filename) == (self.dirpath, self.filename):
                raise ConfigurationError(
                    f"two ModelCheckpoint callbacks (monitor={self.monitor!r} and {other.monitor!r}) write to "
                    f"{self.dirpath} with filename={self.filename!r}: give each a filename of its own"
                )

    def _count_samples(self, trainer: pl.Trainer) -> None:
        seen = self._ranks.exchange(self._counted_here, sum)
        _, readers = lightning_port.data_reader(trainer)
        self.consumed_samples += seen * readers // self._ranks.world_size
        self._counted_here = 0


def ours(trainer: pl.Trainer) -> list[KeptCheckpoints]:
    """The checkpoint callbacks of ``trainer`` that are of this kind."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, KeptCheckpoints)]


def floats(metrics: Any) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {str(key): float(value) for key, value in metrics.items()}
