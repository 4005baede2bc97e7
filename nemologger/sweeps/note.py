"""A Hydra callback that writes down where a sweep is, once Hydra knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

if TYPE_CHECKING:
    from omegaconf import DictConfig


class NoteSweep(Callback):
    """Hydra makes it by itself, from its configuration: a file is how it can tell anybody anything.

    Args:
        path: The file to write the sweep's directory into.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called before the first job, in the process where somebody started the sweep."""
        self._path.write_text(json.dumps(str(Path(config.hydra.runtime.cwd, config.hydra.sweep.dir))))
