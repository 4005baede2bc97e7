"""The last call that Lightning makes to a logger, which is not to take the place of how the run has ended."""

from __future__ import annotations

import logging
from functools import partial

from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

_NAME = "finalize"


def may_fail(logger: Logger) -> None:
    """Let the next ``finalize`` of ``logger`` fail without an exception: it is logged.

    Lightning calls it last. Its error would be that of a run that is complete; or it would replace the exception that the
    run ends with, and the exit code by which a scheduler knows that it is to start the run again.
    """
    setattr(logger, _NAME, partial(_finalize, logger))


def _finalize(logger: Logger, status: str) -> None:
    logger.__dict__.pop(_NAME, None)
    try:
        logger.finalize(status)
    except Exception:
        log.exception("%s could not be ended: what it had not written yet may be lost", type(logger).__name__)
