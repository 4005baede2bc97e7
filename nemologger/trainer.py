"""Lightning's Trainer, whose arguments are captured."""

from __future__ import annotations

from functools import wraps
from typing import Any

import lightning.pytorch as pl

from nemologger.condition import suggests_arguments
from nemologger.context.mixin import IOMixin
from nemologger.loading import checkpoint_io


@suggests_arguments
class Trainer(IOMixin, pl.Trainer):
    """``lightning.pytorch.Trainer``, with the same arguments and behaviour, which remembers what it was made with.

    Its arguments are written into each checkpoint's context. See Lightning's documentation for what they mean. A
    ``ckpt_path`` may be a directory that :class:`nemologger.ModelCheckpoint` has written.

    Example:
        >>> Trainer(max_steps=3, logger=False).__io__.max_steps
        3
    """

    @wraps(pl.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        checkpoint_io.install(self)
