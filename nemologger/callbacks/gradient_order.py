"""The order in which gradients are summed over ranks, from one life of a run to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

from nemologger import lightning_port
from nemologger.exact import reduction

if TYPE_CHECKING:
    import lightning.pytorch as pl


class GradientOrder:
    """That of one fit: noted in the first step of a run, played before that of a resumed one.

    Attributes:
        names: Of the parameters, in order; none where it is not known, or does not matter.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._watched: reduction.GradientOrder | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """For ``on_train_start``, with the :attr:`names` that a checkpoint had."""
        model = trainer.strategy.model
        if not (reduction.depends_on_order(model) and isinstance(model, DistributedDataParallel)):
            self.names = []
        elif lightning_port.has_comm_hook(trainer):
            return  # it may count the steps
        elif self.names:
            reduction.play(model, self.names)
        else:
            self._watched = reduction.GradientOrder(model)

    def batch_trained(self, trainer: pl.Trainer) -> None:
        """For ``on_train_batch_end``."""
        if self._watched is None:
            return
        if lightning_port.is_accumulating(trainer):
            self._watched.forget()
        else:
            self.names, self._watched = self._watched.settle(), None

    def close(self) -> None:
        """Watch no longer."""
        if self._watched is not None:
            self._watched.settle()
            self._watched = None
