"""What may be passed to ModelCheckpoint: checked together, before anything is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from inspect import Parameter
from operator import index
from pathlib import Path
from typing import Any, Literal

from nemologger.checkpoint.keeping.naming import fields, format_name
from nemologger.condition import holds, kind_of, texts_for_flags, unexpected
from nemologger.disk import Disk
from nemologger.errors import ConfigurationError
from nemologger.stores.path import check_options, in_store, storage_path

log = logging.getLogger("nemologger.model_checkpoint")

_NEMO_1 = {
    "always_save_nemo": "every checkpoint is a directory that holds all a .nemo archive would; drop the argument",
    "save_nemo_on_train_end": "the final checkpoint is saved at train end; drop the argument",
    "model_parallel_size": "the trainer's strategy knows how the model is split; drop the argument",
}
_CHOICES: dict[str, tuple[object, ...]] = {
    "on_busy": ("wait", "skip"),
    "staging": ("auto", "at_once", "overlapped"),
    "save_last": (True, False, None, "link"),
    "mode": ("min", "max"),
}
_EXAMPLES = {"monitor": "val_loss", "filename": "{val_loss:.2f}-{step}"}
_SAMPLE = {"epoch": 0, "step": 0, "consumed_samples": 0, "model_name": "model"}


def given_directory(dirpath: str | Path | None, storage_options: Mapping[str, Any] | None) -> Path | None:
    """What ``dirpath`` names, on a disk or in a store; None for the run's."""
    check_options(storage_options)
    directory = None if dirpath is None else storage_path(dirpath, storage_options, "dirpath")
    if storage_options is not None and not _is_in_store(directory):
        log.warning("ModelCheckpoint(storage_options=...) has no effect: dirpath=%r is no URL of a store", dirpath)
    return directory


def possible_last(save_last: bool | Literal["link"] | None, directory: Path | None) -> bool | Literal["link"] | None:
    """``save_last`` as it can be in ``directory``."""
    if save_last == "link" and _is_in_store(directory):
        log.warning(
            "ModelCheckpoint(dirpath=%r, save_last='link'): on a store that is the same as True", str(directory)
        )
        return True
    return save_last


def _is_in_store(directory: Path | None) -> bool:
    return directory is not None and in_store(directory) is not None


def check_arguments(given: Mapping[str, Any], known: Mapping[str, Parameter]) -> None:
    """Refuse what cannot work, and warn of what has no effect.

    Args:
        given: Every argument by its name; ``nemo_1``: those without a parameter.
        known: The parameters.

    Raises:
        ConfigurationError: An argument has a value that cannot work.
        TypeError: There is no such argument.
    """
    _check_nemo_1(given["nemo_1"], known)
    flags = {name: given[name] for name, one in known.items() if isinstance(one.default, bool) and name != "save_last"}
    if wrong := texts_for_flags(flags):
        raise ConfigurationError(f"ModelCheckpoint: {wrong}")
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            raise ConfigurationError(f"{name}={given[name]!r}: {' or '.join(map(repr, choices))}")
    _check_duration("rank_timeout", given["rank_timeout"])
    if given["train_time_interval"] is not None:
        _check_duration("train_time_interval", given["train_time_interval"])
    for name in ("files_per_rank", "max_failed_saves"):
        never = name == "max_failed_saves" and given[name] == math.inf
        if not never and not holds(lambda n: index(n) >= 1, given[name]):
            raise ConfigurationError(f"{name}={given[name]!r}: a whole number, at least 1")
    for name in ("save_top_k", "save_last_n_optim_states"):
        _check_number(name, given[name])
    for name in ("every_n_epochs", "every_n_train_steps"):
        if given[name] is not None and not holds(lambda n: index(n) >= 0, given[name]):
            raise ConfigurationError(f"{name}={given[name]!r}: a whole number, 0 for never")
    for name in ("monitor", "filename"):
        if given[name] is not None and not isinstance(given[name], str):
            raise ConfigurationError(f"{name}={given[name]!r}: a text, for example {_EXAMPLES[name]!r}")
    disk = given["disk"]
    if disk is not None and (isinstance(disk, type) or not isinstance(disk, Disk)):
        raise ConfigurationError(f"disk is {kind_of(disk)}: expected what nemologger.disk.LocalDisk() is, or None")
    if given["filename"] is not None:
        _check_filename(given["filename"], insert_names=given["auto_insert_metric_name"])
    _warn_of_what_has_no_effect(given)


def _warn_of_what_has_no_effect(given: Mapping[str, Any]) -> None:
    if given["staging"] != "auto" and not given["async_save"]:
        log.warning("ModelCheckpoint(staging=%r) has no effect without async_save=True", given["staging"])
    if given["enable_version_counter"]:
        log.warning("ModelCheckpoint(enable_version_counter=True) has no effect: a name is replaced, never numbered")
    if given["save_weights_only"] and given["save_last_n_optim_states"] != -1:
        log.warning(
            "ModelCheckpoint(save_last_n_optim_states=%r) has no effect with save_weights_only=True: no checkpoint has any",
            given["save_last_n_optim_states"],
        )
    if not given["save_last"] and given["save_top_k"] == 0:
        log.warning("ModelCheckpoint(save_last=False, save_top_k=0) saves nothing at all")


def _check_duration(name: str, value: Any) -> None:
    if not isinstance(value, timedelta) or value < timedelta(0):
        raise ConfigurationError(f"{name}={value!r}: a datetime.timedelta, for example timedelta(minutes=10)")


def _check_filename(filename: str, *, insert_names: bool) -> None:
    """Find at once what else the first save would find."""
    names = fields(filename)
    if not filename.count("{") == filename.count("}") == len(names):
        raise ConfigurationError(f"filename={filename!r}: a brace without the other one")
    format_name(filename, {**dict.fromkeys(names, 0.0), **_SAMPLE}, insert_names=insert_names)


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise ConfigurationError(f"{name}={value!r}: a number of checkpoints, 0 for none or -1 for all")


def _check_nemo_1(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in arguments:
        if name not in _NEMO_1:
            raise unexpected("ModelCheckpoint", name, known)
        log.warning("ModelCheckpoint(%s=...) has no effect: %s", name, _NEMO_1[name])
