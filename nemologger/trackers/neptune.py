"""Neptune: gone."""

from __future__ import annotations

from typing import Any

from nemologger.errors import ConfigurationError


class NeptuneLogger:
    """Says that Neptune's service has closed, whatever its arguments.

    Raises:
        ConfigurationError: Always.

    Example:
        >>> NeptuneLogger(project="team/project")
        Traceback (most recent call last):
        nemologger.errors.ConfigurationError: Neptune's service closed in March 2026...
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigurationError(
            "Neptune's service closed in March 2026, and Lightning has removed its logger: nothing could be logged. Use "
            "MLFlowLogger (a database in the run directory, or your own server), CometLogger or ClearMLLogger of "
            "nemologger.trackers, or Lightning's WandbLogger or TensorBoardLogger, in NeMoLogger(extra_loggers=[...])."
        )
