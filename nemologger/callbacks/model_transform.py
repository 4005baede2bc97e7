"""Change a model before it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ModelTransform(Callback):
    """Calls ``transform(model)`` once, before weights are restored and optimizers are made.

    Args:
        transform: Changes the model in place. It may return the model, or nothing.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform
        self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Transform the model.

        Raises:
            ConfigurationError: If the transform returns another object: Lightning holds on to the one it was given.
        """
        if self._done:
            return
        result = self.transform(pl_module)
        if result is not None and result is not pl_module:
            raise ConfigurationError(
                f"model_transform returned another object (a {type(result).__name__}): change the model in place"
            )
        self._done = True
