"""How long training, validation and test steps take, for the loggers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.callbacks.step_timer import StepTimer
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl

_TOKENS = ("tokens", "text", "input_ids")


class TimingCallback(IOMixin, Callback):
    """Logs how long steps take, in s, as NeMo does: ``train_step_timing in s`` and ``train_backward_timing in s``.

    Likewise ``validation_step_timing in s`` and ``test_step_timing in s``. A step is the work on one batch, from
    ``on_train_batch_start`` to ``on_train_batch_end``; loading the batch is not part of it (see
    :class:`~nemologger.callbacks.delta_timing.DeltaTimingCallback`). Every step is measured. What is logged is the steps
    that the trainer logs at all (``log_every_n_steps``): logging takes several times as long as measuring.

    Args:
        log_tokens_per_sec: Also log ``tokens_per_sec_per_gpu``: the tokens of this rank's batches, through the time of
            their steps. Tokens are the elements of the batch's ``tokens``, ``text`` or ``input_ids``; of a batch that is a
            tensor or a sequence, the elements of the first tensor.
        timer_kwargs: ``buffer_size``: over how many of the last steps to reduce (default 1: the last step).
            ``reduction``: ``"mean"`` (default), ``"sum"``, ``"min"``, ``"max"``, or ``"none"`` for the last one.
            ``sync_cuda``: wait for the GPU before looking at the clock (default False); else a step is as long as
            launching its work takes.

    Raises:
        ConfigurationError: If ``timer_kwargs`` holds anything else, or there are no tokens in a batch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     callbacks=[TimingCallback(timer_kwargs={"buffer_size": 20})], logger=False, accelerator="cpu"
        ... )
    """

    def __init__(self, log_tokens_per_sec: bool = False, timer_kwargs: Mapping[str, Any] | None = None) -> None:
        self.log_tokens_per_sec = log_tokens_per_sec
        self._train, self._backward, self._validation, self._test = (
            StepTimer.made_of(type(self).__name__, timer_kwargs) for _ in range(4)
        )
        self._tokens: deque[int] = deque(maxlen=self._train.buffer_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A training step begins."""
        self._train.start()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Its backward pass begins."""
        self._backward.start()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """And ends."""
        self._backward.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The training step ends: log it, if the trainer logs."""
        self._train.stop()
        if self.log_tokens_per_sec:
            self._tokens.append(_tokens(batch))
        if not lightning_port.logs_this_batch(trainer):
            return
        _log(trainer, "train_step_timing in s", self._train.value, prog_bar=True)
        _log(trainer, "train_backward_timing in s", self._backward.value)
        if self.log_tokens_per_sec and self._train.total:
            _log(trainer, "tokens_per_sec_per_gpu", sum(self._tokens) / self._train.total, prog_bar=True)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation step begins."""
        self._validation.start()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """It ends: log it."""
        self._validation.stop()
        if trainer.loggers or lightning_port.logs_this_batch(trainer):
            _log(trainer, "validation_step_timing in s", self._validation.value)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test step begins."""
        self._test.start()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """It ends: log it."""
        self._test.stop()
        if trainer.loggers or lightning_port.logs_this_batch(trainer):
            _log(trainer, "test_step_timing in s", self._test.value)


def _log(trainer: pl.Trainer, name: str, value: float | None, *, prog_bar: bool = False) -> None:
    if value is None:
        return
    if not trainer.loggers:
        lightning_port.show_metrics(trainer, {name: value}, prog_bar=prog_bar)
        return
    # Given the batch size, Lightning does not search the batch for one.
    trainer.lightning_module.log(name, value, on_step=True, on_epoch=False, batch_size=1, prog_bar=prog_bar)


def _tokens(batch: Any) -> int:
    """How many tokens ``batch`` holds."""
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _TOKENS if key in batch), None)
    while isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        shown = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ConfigurationError(
            f"TimingCallback(log_tokens_per_sec=True): no tokens in a batch that is {shown}; expected a tensor, a sequence "
            f"that begins with one, or a mapping with one of the keys {', '.join(_TOKENS)}"
        )
    return found.numel()
