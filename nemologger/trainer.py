"""Lightning's Trainer, whose arguments are captured."""

from __future__ import annotations

import lightning.pytorch as pl

from nemologger.context.mixin import IOMixin


class Trainer(IOMixin, pl.Trainer):
    """``lightning.pytorch.Trainer``, with the same arguments and behaviour, which remembers what it was made with.

    Its arguments are written into each checkpoint's context. See Lightning's documentation for what they mean.

    Example:
        >>> Trainer(max_steps=3, logger=False).__io__.max_steps
        3
    """
