"""The fit of a trainer, as exact resume sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from nemologger import lightning_port
from nemologger.exact.loaders.session import Fit

if TYPE_CHECKING:
    import lightning.pytorch as pl


class RunningFit(Fit):
    """That of a trainer."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer

    @property
    @override
    def rank(self) -> int:
        return lightning_port.data_reader(self.trainer)[0]

    @property
    @override
    def ranks(self) -> int:
        return int(self.trainer.world_size)

    @property
    @override
    def device(self) -> torch.device:
        return self.trainer.strategy.root_device

    @override
    def loaders(self) -> list[Any]:
        return lightning_port.training_loaders(self.trainer)

    @override
    def trains_from(self, batches: object) -> bool:
        return lightning_port.trains_from(self.trainer, batches)

    @override
    def fetches_ahead(self) -> bool:
        return lightning_port.fetches_ahead(self.trainer)

    @override
    def round(self) -> int:
        return lightning_port.fetched(self.trainer)

    @override
    def goes_on_within_epoch(self) -> bool:
        return lightning_port.goes_on_within_epoch(self.trainer)
