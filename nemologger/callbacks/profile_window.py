"""When to profile: the steps that a profiler was asked for, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ProfileWindow(IOMixin, Callback):
    """Calls :meth:`begin` and :meth:`end` around a range of optimizer steps.

    Steps are counted over the whole run, as ``trainer.global_step`` is: a resumed run profiles what is left of the range,
    or nothing.

    Args:
        start_step: Begin when so many optimizer steps have been made.
        end_step: End when so many have been made. The same number as ``start_step`` means one step.
        ranks: The global ranks that do it; empty for all.

    Raises:
        ConfigurationError: If the numbers cannot work.
    """

    def __init__(self, start_step: int, end_step: int, ranks: Sequence[int]) -> None:
        if not holds(lambda: 0 <= index(start_step) <= index(end_step)):
            raise ConfigurationError(
                f"{type(self).__name__}(start_step={start_step!r}, end_step={end_step!r}): steps count from 0, and the end "
                "comes after the start"
            )
        if not holds(lambda: all(index(rank) >= 0 for rank in ranks)):
            raise ConfigurationError(
                f"{type(self).__name__}(ranks={ranks!r}): expected a list of ranks, which count from 0; empty for all"
            )
        self.start_step = start_step
        self.end_step = end_step
        self.ranks = list(ranks)
        self._active = False

    def begin(self, trainer: pl.Trainer) -> None:
        """Start to profile."""
        raise NotImplementedError

    def end(self, trainer: pl.Trainer) -> None:
        """Stop, and write down what was seen."""
        raise NotImplementedError

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the ranks are there.

        Raises:
            ConfigurationError: If one is not.
        """
        missing = [rank for rank in self.ranks if rank >= trainer.world_size]
        if stage == "fit" and missing:
            raise ConfigurationError(
                f"{type(self).__name__}(ranks={self.ranks}): there is no rank {missing[0]}, the run has "
                f"{trainer.world_size}"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin with the first batch of a step in the range."""
        wanted = not self.ranks or trainer.global_rank in self.ranks
        if wanted and not self._active and self.start_step <= lightning_port.steps_taken(trainer) < self._end:
            self._active = True
            self.begin(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End with the last batch of the last step."""
        if lightning_port.steps_taken(trainer) >= self._end:
            self._finish(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End, if training has before the range did."""
        self._finish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End; what was seen may say why."""
        self._finish(trainer)

    @property
    def _end(self) -> int:
        return max(self.end_step, self.start_step + 1)

    def _finish(self, trainer: pl.Trainer) -> None:
        if self._active:
            self._active = False
            self.end(trainer)
