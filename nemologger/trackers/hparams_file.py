"""``hparams.yaml``, also of hyperparameters that OmegaConf cannot take."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.core.saving import save_hparams_to_yaml


def add_hparams(directory: str, name: str, params: dict[str, Any] | Namespace) -> None:
    """As :func:`write_hparams`, where ``directory``, which may be a URL, is there and has no such file yet."""
    file, files = f"{directory}/{name}", get_filesystem(directory)
    if files.isdir(directory) and not files.isfile(file):
        write_hparams(file, params)


def write_hparams(file: Path | str, params: dict[str, Any] | Namespace) -> None:
    """Write ``params`` as Lightning does.

    Where OmegaConf is there, as it is with this package, Lightning has it take apart what is a dataclass, and passes on what
    that raises: a NameError, if its annotations name what is imported for type checkers only, as those of a configuration
    of transformers. Without OmegaConf it writes such a value as YAML can, or leaves it out.
    """
    try:
        save_hparams_to_yaml(str(file), params)
    except OSError:
        raise
    except Exception:  # noqa: BLE001  of a class of somebody's
        save_hparams_to_yaml(str(file), params, use_omegaconf=False)
