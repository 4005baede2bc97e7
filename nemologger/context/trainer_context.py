"""What a checkpoint keeps of the objects of a run: the model, the trainer, and what else was given to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from nemologger.context.mixin import IOMixin
from nemologger.disk import Disk
from nemologger.errors import ContextError


@dataclass
class TrainerContext(IOMixin):
    """The objects of a run, to be written with each checkpoint.

    Attributes:
        model: The module.
        trainer: The trainer. A ``nemologger.Trainer`` knows its arguments; of another one only its class is kept.
        extra: What else belongs to the run, by name; ``extra["datamodule"]`` is the data module.

    Example:
        >>> from nemologger.trainer import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> context = TrainerContext(BoringModel(), Trainer(max_steps=1, logger=False))
        >>> context.__io__.trainer.max_steps
        1
    """

    model: Any
    trainer: Any
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_trainer(cls, trainer: pl.Trainer) -> TrainerContext:
        """The context of the run that ``trainer`` is in.

        Raises:
            ContextError: If the trainer has no module yet, because it is not in ``fit``, ``validate`` or ``test``.
        """
        model = trainer.lightning_module
        if model is None:
            raise ContextError(
                "the trainer has no module yet, so there is no context; call from_trainer during fit, or pass both: "
                "TrainerContext(model, trainer)"
            )
        datamodule = getattr(trainer, "datamodule", None)
        return cls(model, trainer, {} if datamodule is None else {"datamodule": datamodule})

    def io_dump(
        self,
        output: str | Path,
        yaml_attrs: Sequence[str] = ("model",),
        *,
        disk: Disk | None = None,
        strict: bool = True,
    ) -> None:
        """Write the context into the directory ``output``, with ``model.yaml`` by default; see :meth:`IOMixin.io_dump`."""
        super().io_dump(output, yaml_attrs, disk=disk, strict=strict)

    def _io_minor(self, strict: bool) -> tuple[str, ...]:
        # A run and its model come back without them: settings of data and callbacks beside a checkpoint are for reading.
        return () if strict else ("trainer.", "extra.")

    def _io_owner(self) -> object:
        return self.trainer if hasattr(self.trainer, "__dict__") else self.model
