"""What may be passed to ModelCheckpoint: checked together, before anything is made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from datetime import timedelta
from operator import index
from pathlib import Path
from typing import Any, Literal

from nemologger.checkpoint.keeping.naming import fields, format_name
from nemologger.condition import holds, texts_for_flags, unexpected
from nemologger.errors import ConfigurationError
from nemologger.stores.path import in_store, storage_path

log = logging.getLogger("nemologger.model_checkpoint")

_NEMO_1 = {
    "always_save_nemo": "every checkpoint is a directory that holds all a .nemo archive would; drop the argument",
    "save_nemo_on_train_end": "the final checkpoint is saved at train end; drop the argument",
    "model_parallel_size": "the trainer's strategy knows how the model is split; drop the argument",
}
_SAMPLE = {"epoch": 0, "step": 0, "consumed_samples": 0, "model_name": "model"}


def given_directory(dirpath: str | Path | None, storage_options: Mapping[str, Any] | None) -> Path | None:
    """What ``dirpath`` names, on a disk or in a store; None for the run's."""
    directory = None if dirpath is None else storage_path(dirpath, storage_options)
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


def check_arguments(
    nemo_1: Mapping[str, Any],
    *,
    known: Iterable[str],
    flags: Mapping[str, Any],
    rank_timeout: Any,
    save_top_k: Any,
    save_last: Any,
    save_last_n_optim_states: Any,
    save_weights_only: bool,
    intervals: Mapping[str, Any],
    train_time_interval: Any,
    filename: Any,
    auto_insert_metric_name: bool,
    on_busy: str,
    async_save: bool,
    staging: str,
    enable_version_counter: bool,
    files_per_rank: int,
    max_failed_saves: int,
) -> None:
    """Refuse what cannot work, and warn of what has no effect.

    Raises:
        ConfigurationError: An argument has a value that cannot work.
        TypeError: There is no such argument.
    """
    _check_nemo_1(nemo_1, known)
    if wrong := texts_for_flags(flags):
        raise ConfigurationError(f"ModelCheckpoint: {wrong}")
    _check_duration("rank_timeout", rank_timeout)
    if on_busy not in ("wait", "skip"):
        raise ConfigurationError(f'on_busy={on_busy!r}: "wait" or "skip"')
    if staging not in ("auto", "at_once", "overlapped"):
        raise ConfigurationError(f'staging={staging!r}: "auto", "at_once" or "overlapped"')
    if staging != "auto" and not async_save:
        log.warning("ModelCheckpoint(staging=%r) has no effect without async_save=True", staging)
    if enable_version_counter:
        log.warning("ModelCheckpoint(enable_version_counter=True) has no effect: a name is replaced, never numbered")
    if files_per_rank < 1 or max_failed_saves < 1:
        raise ConfigurationError(
            f"ModelCheckpoint(files_per_rank={files_per_rank}, max_failed_saves={max_failed_saves}): both must be at least 1"
        )
    if filename is not None:
        _check_filename(filename, insert_names=auto_insert_metric_name)
    _check_types(save_top_k, save_last, train_time_interval)
    for name, interval in intervals.items():
        if interval is not None and not holds(lambda n: index(n) >= 0, interval):
            raise ConfigurationError(f"{name}={interval!r}: a whole number, 0 for never")
    _check_number("save_last_n_optim_states", save_last_n_optim_states)
    if save_weights_only and save_last_n_optim_states != -1:
        log.warning(
            "ModelCheckpoint(save_last_n_optim_states=%r) has no effect with save_weights_only=True: no checkpoint has any",
            save_last_n_optim_states,
        )
    if not save_last and save_top_k == 0:
        log.warning("ModelCheckpoint(save_last=False, save_top_k=0) saves nothing at all")


def _check_types(save_top_k: Any, save_last: Any, train_time_interval: Any) -> None:
    _check_number("save_top_k", save_top_k)
    if save_last not in (True, False, None, "link"):
        raise ConfigurationError(f'save_last={save_last!r}: True, False or "link"')
    if train_time_interval is not None:
        _check_duration("train_time_interval", train_time_interval)


def _check_duration(name: str, value: Any) -> None:
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{name}={value!r}: a datetime.timedelta, for example timedelta(minutes=10)")


def _check_filename(filename: Any, *, insert_names: bool) -> None:
    """Find at once what else the first save would find."""
    if not isinstance(filename, str):
        raise ConfigurationError(f'filename={filename!r}: a text, for example "{{val_loss:.2f}}-{{step}}"')
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
