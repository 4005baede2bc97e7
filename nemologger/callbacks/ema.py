"""An exponential moving average of the weights, beside those that are trained.

Lightning's ``WeightAveraging`` is not built upon. It puts the averages into ``state_dict`` of a checkpoint and overwrites
the trained weights with them at the end, it leaves them in the model when validation raises, averages or freezes buffers,
copies the whole module, and rounds otherwise than the formula is written.
"""

from __future__ import annotations

import logging
import weakref
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from nemologger import lightning_port, sharded_state
from nemologger.callbacks.averages import Averages
from nemologger.checkpoint.find import settled
from nemologger.checkpoint.reading.load import averages_of
from nemologger.checkpoint.state.snapshot import EMA_STATE, MODEL, OtherWeights
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.disk.there import is_dir
from nemologger.errors import ConfigurationError
from nemologger.loading.checkpoint_io import place_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class EMA(IOMixin, lightning_port.KeepsWeights):
    """Keeps ``ema = decay * ema + (1 - decay) * weight`` of every trained parameter.

    Validation, test and prediction see the averages in place of the weights; training, and ``weights/`` of every checkpoint,
    never do. A checkpoint of ``nemologger.ModelCheckpoint`` holds the averages in a directory ``ema_weights/`` of the same
    format as ``weights/``, written by the same save; files of Lightning hold them under ``ema_state_dict``, unless they are
    saved with ``weights_only``. A resumed run goes on with the very same averages.
    ``nemologger.load_weights(checkpoint, model, ema=True)`` loads them.

    Where the strategy shards parameters (FSDP2, tensor parallelism, FSDP), each rank keeps, and writes, the averages of
    what it has of them. Any other strategy, on any number of ranks, can go on from such a checkpoint. Those that Lightning
    itself saves there, as ``trainer.save_checkpoint`` does, hold no averages.

    They begin as a copy of the weights before the first step. Parameters of less than 32 bits are averaged in 32 bits:
    in 16, a step of ``1 - decay`` is lost in rounding. Frozen parameters and buffers are not averaged: the model's own are
    used, and stored, with the averages.

    Args:
        decay: How much of the average stays in each update, 0 to 1.
        validate_original_weights: Validate, test and predict with the weights as they are trained.
        every_n_steps: Update at every n-th optimizer step, counted over the whole run.
        cpu_offload: Keep the averages in the memory of the CPU. Each update then copies the weights there; a larger
            ``every_n_steps`` makes that cheaper.

    Raises:
        ConfigurationError: If an argument has a value that cannot work; before the first step, if the strategy is
            DeepSpeed's, or if it is ``FSDPStrategy`` with parameters of less than 32 bits or ``use_orig_params=False``: use
            ``FSDP2Strategy`` then.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> ema, model = EMA(decay=0.5), BoringModel()
        >>> before = model.layer.bias.detach().clone()
        >>> trainer = Trainer(callbacks=[ema], max_steps=1, limit_val_batches=0, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(model)
        >>> torch.equal(ema.averages["layer.bias"], 0.5 * before + 0.5 * model.layer.bias.detach())
        True
    """

    def __init__(
        self,
        decay: float = 0.999,
        validate_original_weights: bool = False,
        every_n_steps: int = 1,
        cpu_offload: bool = False,
    ) -> None:
        if not holds(lambda: 0.0 <= decay <= 1.0):
            raise ConfigurationError(f"EMA(decay={decay!r}): it must be from 0 to 1, for example 0.999")
        if not holds(lambda: index(every_n_steps) >= 1):
            raise ConfigurationError(f"EMA(every_n_steps={every_n_steps!r}): it must be a whole number, at least 1")
        self.decay = decay
        self.validate_original_weights = validate_original_weights
        self.every_n_steps = every_n_steps
        self.cpu_offload = cpu_offload
        self._module: weakref.ref[torch.nn.Module] | None = None
        self._averages = Averages(decay, cpu_offload=cpu_offload)
        self._position = (0, 0)
        self._saved: dict[str, torch.Tensor] | None = None  # what a checkpoint holds, before it is taken over
        self._saved_names: frozenset[str] | None = None
        self._warned: set[str] = set()

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name; the live tensors. Empty before training starts.

        They are sharded as the parameters are: with FSDP2 and tensor parallelism each is a ``DTensor``, with FSDP the run of
        elements that this rank has.
        """
        return dict(self._averages.values)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}  # a copy, or what another process gets, belongs to no model yet

    # --- training -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the strategy, and act before checkpoint callbacks do."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ConfigurationError(
                f"EMA does not work with {type(trainer.strategy).__name__}, which has a form of its own for parameters. Use "
                "nemologger's FSDP2Strategy, or leave the callback out."
            )
        callbacks = lightning_port.callbacks(trainer)
        first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
        if self in callbacks[first:]:
            others = [callback for callback in callbacks if callback is not self]
            lightning_port.set_callbacks(trainer, [*others[:first], self, *others[first:]])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights, or go on with the averages of the checkpoint or of the fit before."""
        before, self._position = self._position, lightning_port.position(trainer)
        goes_on = self._belongs_to(pl_module) and before == self._position and trainer.ckpt_path is None
        self._module = weakref.ref(pl_module)
        self._averages.attach(trainer.strategy, fresh=not goes_on)
        if trainer.ckpt_path is not None and not self._take_over(trainer) and trainer.is_global_zero:
            log.warning(
                "%s holds no averaged weights: the averages begin with its weights at step %d",
                trainer.ckpt_path,
                trainer.global_step,
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The average of a parameter that is trained from now on begins with its value of now."""
        if not self._averages.are_complete:
            self._averages.track()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after every n-th optimizer step; the last batch need not have made one."""
        before, self._position = self._position, lightning_port.position(trainer)
        # Several optimizers count several steps in one batch.
        if lightning_port.passes(self.every_n_steps, before, self._position):
            self._averages.update()

    def _belongs_to(self, module: torch.nn.Module) -> bool:
        return self._module is not None and self._module() is module and bool(self._averages.values)

    # --- validation, test and prediction --------------------------------------------------------------------------

    # At the start of the epoch: a checkpoint callback that still copies weights beside training is told to finish at that of
    # validation, and it comes after this one.

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model have the averages."""
        if not trainer.sanity_checking:
            self._lend(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it its weights back, before a checkpoint is saved."""
        self._averages.give_back(trainer.strategy)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model have the averages."""
        self._lend(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it its weights back."""
        self._averages.give_back(trainer.strategy)

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model have the averages."""
        self._lend(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it its weights back."""
        self._averages.give_back(trainer.strategy)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the model its weights back, before a checkpoint is saved."""
        self._averages.give_back(trainer.strategy)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the model its weights back, whatever happened."""
        self._averages.give_back(trainer.strategy)
        self._saved = self._saved_names = None

    def _lend(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.validate_original_weights:
            return
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            self._module = weakref.ref(module)
            self._averages.attach(trainer.strategy, fresh=True)
            if not self._take_over(trainer):
                self._averages.values = {}
                if trainer.is_global_zero:
                    log.warning("%s holds no averaged weights: its weights are used as they are", trainer.ckpt_path)
        if self._belongs_to(module):
            self._averages.lend(trainer.strategy)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which parameters are averaged. Their averages are weights: :meth:`on_save_checkpoint` hands them over."""
        return {"averaged": sorted(self._averages.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._saved_names = frozenset(state_dict.get("averaged", ()))

    def before_save(self, trainer: pl.Trainer) -> None:
        """FSDP makes the shards of the averages on all ranks together."""
        if self._belongs_to(trainer.lightning_module):
            self._averages.gather(trainer.strategy)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averages, as a state dictionary of the model; make sure that the other one has what is trained."""
        if not self._belongs_to(pl_module):
            return
        if sharded_state.shards_state(trainer.strategy) and not sharded_state.is_kept_in_place(trainer.strategy):
            self._leave_to_lightning(trainer, checkpoint)
            return
        averages = self._averages.in_state(pl_module, checkpoint[MODEL])
        if EMA_STATE in checkpoint:
            self._warn(trainer, "what another callback saves as %r is lost: EMA saves its averages under it", EMA_STATE)
        checkpoint[EMA_STATE] = OtherWeights(averages)
        missing = sorted(self._averages.values.keys() - averages.keys())
        if missing:
            said = "the model's state dictionary lacks %s, so their averages are not saved"
            self._warn(trainer, said, ", ".join(missing))

    def _leave_to_lightning(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Its own checkpoints of sharded models hold the tensors of model and optimizers, and no others."""
        if self._averages.are_lent:
            checkpoint[MODEL] = self._averages.trained_state(trainer.strategy)
        self._warn(
            trainer,
            "a checkpoint that Lightning saves with %s holds no averages: have nemologger.ModelCheckpoint save it",
            type(trainer.strategy).__name__,
        )

    def _warn(self, trainer: pl.Trainer, message: str, about: str) -> None:
        if trainer.is_global_zero and message not in self._warned:
            log.warning(message, about)
        self._warned.add(message)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages out of a checkpoint file; those of a directory are read when they are needed."""
        self._saved = checkpoint.get(EMA_STATE)

    def _take_over(self, trainer: pl.Trainer) -> bool:
        """Go on with the averages of the checkpoint that the trainer has loaded. Whether it holds some."""
        from_file, self._saved = self._saved, None
        path = settled(place_of(trainer, str(trainer.ckpt_path)))
        saved = averages_of(path) if is_dir(path) else from_file  # in a directory it is somebody else's
        if saved is None:
            return False
        if self._saved_names is not None:
            self._averages.track(self._saved_names)
        self._averages.take_over(trainer.strategy, saved)
        return True
