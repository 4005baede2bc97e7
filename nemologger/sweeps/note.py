"""A Hydra callback that settles a sweep before it starts, and writes down where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from nemologger.errors import NemologgerError
from nemologger.sweeps import devices, launchers, record

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
        """Called in the process where somebody started the sweep, before Hydra makes its sweeper and its launcher."""
        hydra = config.hydra
        try:
            directory = record.place(hydra)
            with read_write(config), open_dict(config):
                if hydra.launcher._target_ == launchers.NEMO:
                    hydra.launcher = launchers.translated(config, devices.visible(os.environ))
                if directory != Path(hydra.runtime.cwd, hydra.sweep.dir):
                    hydra.sweep.dir = str(directory)  # Hydra has a file for it too
        except (NemologgerError, OmegaConfBaseException) as error:
            raise launchers.NotStarted(error) from error
        self._path.write_text(json.dumps(str(directory)))
