"""An exponential moving average of the weights, beside those that are trained.

Lightning's ``WeightAveraging`` is not built upon. It puts the averages into ``state_dict`` of a checkpoint and overwrites
the trained weights with them at the end, it leaves them in the model when validation raises, averages or freezes buffers,
copies the whole module, and rounds otherwise than the formula is written.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from nemologger import lightning_port
from nemologger.checkpoint.find import settled
from nemologger.checkpoint.in_place import places_in
from nemologger.checkpoint.load import averages_of, load_model
from nemologger.checkpoint.snapshot import EMA_STATE, MODEL
from nemologger.checkpoint_io import place_of
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError, ModelMismatchError

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_CHUNK = 64 << 20
_IN_CACHE = 1 << 16
_SPREAD = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class EMA(IOMixin, lightning_port.KeepsWeights):
    """Keeps ``ema = decay * ema + (1 - decay) * weight`` of every trained parameter.

    Validation and test see the averages in place of the weights; training, and ``weights/`` of every checkpoint, never do.
    A checkpoint of ``nemologger.ModelCheckpoint`` holds the averages in a directory ``ema_weights/`` of the same format as
    ``weights/``, written by the same save; files of Lightning hold them under ``ema_state_dict``, unless
    they are saved with ``weights_only``. A
    resumed run goes on with the very same averages. ``nemologger.load_weights(checkpoint, model, ema=True)`` loads them.

    They begin as a copy of the weights before the first step. Parameters of less than 32 bits are averaged in 32 bits:
    in 16, a step of ``1 - decay`` is lost in rounding. Frozen parameters and buffers are not averaged: the model's own are
    used, and stored, with the averages.

    Args:
        decay: How much of the average stays in each update, 0 to 1.
        validate_original_weights: Validate and test with the weights as they are trained.
        every_n_steps: Update at every n-th optimizer step, counted over the whole run.
        cpu_offload: Keep the averages in the memory of the CPU. Each update then copies the weights there; a larger
            ``every_n_steps`` makes that cheaper.

    Raises:
        ConfigurationError: If an argument has a value that cannot work; at setup, if the strategy spreads parameters over
            ranks (FSDP, model parallel, DeepSpeed).

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
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._averages: dict[str, torch.Tensor] = {}
        self._chunks: list[list[str]] = []
        self._step = 0
        self._saved: dict[str, torch.Tensor] | None = None  # what a checkpoint holds, before it is taken over
        self._saved_names: frozenset[str] | None = None
        self._originals: dict[str, torch.Tensor] = {}  # while the model has the averages

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name; the live tensors. Empty before training starts."""
        return dict(self._averages)

    # --- training -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the strategy, and act before checkpoint callbacks do."""
        if isinstance(trainer.strategy, _SPREAD):
            raise ConfigurationError(
                f"EMA does not work with {type(trainer.strategy).__name__}, where no rank has whole parameters. Use DDP, or "
                "leave the callback out."
            )
        callbacks = lightning_port.callbacks(trainer)
        first = next((i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
        if self in callbacks[first:]:
            others = [callback for callback in callbacks if callback is not self]
            # Another list: Lightning is iterating over this one.
            trainer.callbacks = [*others[:first], self, *others[first:]]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights, or go on with the averages of the checkpoint or of the fit before."""
        goes_on = self._belongs_to(pl_module) and self._step == trainer.global_step and trainer.ckpt_path is None
        self._attach(pl_module, fresh=not goes_on)
        self._step = trainer.global_step
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
        if any(p.requires_grad and name not in self._averages for name, p in self._parameters.items()):
            self._track()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after every n-th optimizer step; the last batch need not have made one."""
        before, self._step = self._step, trainer.global_step
        # Several optimizers count several steps in one batch.
        if self._step // self.every_n_steps > before // self.every_n_steps:
            self._update()

    def _attach(self, module: torch.nn.Module, *, fresh: bool) -> None:
        self._give_back()
        self._module = weakref.ref(module)
        self._parameters = dict(module.named_parameters())
        if fresh:
            self._averages = {}
        self._track()

    def _belongs_to(self, module: torch.nn.Module) -> bool:
        return self._module is not None and self._module() is module and bool(self._averages)

    @torch.no_grad()
    def _track(self, names: frozenset[str] = frozenset()) -> None:
        """Keep an average of every parameter that is trained, and of ``names``."""
        for name, parameter in self._parameters.items():
            if (
                (parameter.requires_grad or name in names)
                and name not in self._averages
                and _can_be_averaged(parameter)
            ):
                device = torch.device("cpu") if self.cpu_offload else parameter.device
                self._averages[name] = parameter.detach().to(device, _wide(parameter.dtype), copy=True)
        self._chunks = [[]]
        size = 0
        for name, average in self._averages.items():
            if self._chunks[-1] and size + average.nbytes > _CHUNK:
                self._chunks.append([])
                size = 0
            self._chunks[-1].append(name)
            size += average.nbytes

    @torch.no_grad()
    def _update(self) -> None:
        # Product and sum apart, as the formula is written: a fused multiply-add has other last bits. A chunk at a time, so
        # that the products need little memory.
        for chunk in self._chunks:
            averages = [self._averages[name] for name in chunk]
            weights = [
                self._parameters[name].detach().to(average.device, average.dtype)
                for name, average in zip(chunk, averages, strict=True)
            ]
            if averages[0].device.type == "cpu":
                for average, weight in zip(averages, weights, strict=True):
                    _average_in_cache(average, weight, self.decay)
            else:
                torch._foreach_mul_(averages, self.decay)
                torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - self.decay))  # noqa: SLF001  no public name

    # --- validation and test --------------------------------------------------------------------------------------

    # At the start of the epoch: a checkpoint callback that still copies weights beside training is told to finish at that of
    # validation, and it comes after this one.

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model have the averages."""
        if not trainer.sanity_checking:
            self._lend(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it its weights back, before a checkpoint is saved."""
        self._give_back()

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the model have the averages."""
        self._lend(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give it its weights back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the model its weights back, before a checkpoint is saved."""
        self._give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the model its weights back, whatever happened."""
        self._give_back()
        self._saved = self._saved_names = None

    def _lend(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.validate_original_weights:
            return
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None:
            self._attach(module, fresh=True)
            if not self._take_over(trainer):
                self._averages = {}
                if trainer.is_global_zero:
                    log.warning("%s holds no averaged weights: its weights are used as they are", trainer.ckpt_path)
        if not self._belongs_to(module):
            return
        self._parameters = dict(module.named_parameters())  # moving a module between devices may make new ones
        with _ordinary_tensors():
            self._originals = {
                name: self._parameters[name].detach().to(average.device, copy=True)
                for name, average in self._averages.items()
            }
            for name, average in self._averages.items():
                self._parameters[name].copy_(average)

    def _give_back(self) -> None:
        with _ordinary_tensors():
            for name, original in self._originals.items():
                self._parameters[name].copy_(original)
        self._originals = {}

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Which parameters are averaged. Their averages are weights: :meth:`on_save_checkpoint` hands them over."""
        return {"averaged": sorted(self._averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._saved_names = frozenset(state_dict.get("averaged", ()))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averages, as a state dictionary of the model; make sure that the other one has what is trained."""
        if not self._belongs_to(pl_module):
            return
        averages: dict[str, Any] = dict(checkpoint[MODEL])
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        # Once more with the names that share a parameter.
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            average = self._averages.get(name_of.get(id(parameter), ""))
            if average is not None and name in averages:
                averages[name] = average
                if self._originals:
                    checkpoint[MODEL][name] = self._originals[name_of[id(parameter)]]
        checkpoint[EMA_STATE] = averages
        missing = sorted(self._averages.keys() - averages.keys())
        if missing and trainer.is_global_zero:
            log.warning("the model's state dictionary lacks %s, so their averages are not saved", ", ".join(missing))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages out of a checkpoint file; those of a directory are read when they are needed."""
        self._saved = checkpoint.get(EMA_STATE)

    def _take_over(self, trainer: pl.Trainer) -> bool:
        """Go on with the averages of the checkpoint that the trainer has loaded. Whether it holds some."""
        saved, self._saved = self._saved, None
        trained = self._saved_names or frozenset()
        if saved is not None:
            self._track(trained)
        else:
            directory = averages_of(settled(place_of(trainer, str(trainer.ckpt_path))))
            if directory is None:
                return False
            self._track(trained)
            saved = load_model(directory, places_in(self._averages), self._averages.__contains__)
        with torch.no_grad():
            for name, average in self._averages.items():
                if name not in saved:
                    continue  # it was not trained then
                if saved[name].shape != average.shape:
                    raise ModelMismatchError(
                        f"{trainer.ckpt_path}: the average of {name} has shape {tuple(saved[name].shape)}, the parameter "
                        f"{tuple(average.shape)}"
                    )
                average.copy_(saved[name])
        return True


def _can_be_averaged(parameter: torch.nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _average_in_cache(average: torch.Tensor, weight: torch.Tensor, decay: float) -> None:
    """The formula, a part at a time: three passes over all of the memory, and fresh memory for products, take far longer."""
    if average.is_contiguous() and weight.is_contiguous():
        parts = zip(torch.split(average.view(-1), _IN_CACHE), torch.split(weight.view(-1), _IN_CACHE), strict=True)
        for part, weights in parts:
            part.mul_(decay).add_(weights * (1 - decay))
    else:
        average.mul_(decay).add_(weight * (1 - decay))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Validation runs in inference mode, whose tensors cannot be used like others later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
