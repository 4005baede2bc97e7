"""The checkpoint callback that a section asks for, and the file that it has the model exported to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from nemologger.errors import ConfigurationError
from nemologger.exp_manager.calls import Call, Name
from nemologger.exp_manager.config import CallbackParams, Section
from nemologger.exp_manager.notes import Notes

PARAMS = "checkpoint_callback_params"
# Arguments that have the same name and meaning.
_SAME = (
    "monitor",
    "verbose",
    "save_last",
    "save_top_k",
    "save_weights_only",
    "mode",
    "auto_insert_metric_name",
    "every_n_train_steps",
    "save_on_train_epoch_end",
    "async_save",
)
_EXPORT = ("prefix", "postfix", "save_best_model", "always_save_nemo", "save_nemo_on_train_end")


def checkpoint_call(section: Section, notes: Notes) -> Call | None:
    """Makes the ModelCheckpoint, None if there is to be none.

    Raises:
        ConfigurationError: ``train_time_interval`` is no time.
    """
    params = _params(section)
    given = {key.removeprefix(f"{PARAMS}.") for key in section.given if key.startswith(f"{PARAMS}.")}
    if not section.config.create_checkpoint_callback:
        if section.asks_for(PARAMS):
            notes.warn(PARAMS, "has no effect: create_checkpoint_callback is off")
        return None
    arguments = {name: getattr(params, name) for name in _SAME}
    interval = _interval(params.train_time_interval)
    others = params.every_n_train_steps or interval is not None
    # 1 is what NeMo 1 has when nobody asks for anything; with another interval it would be an error there.
    arguments["every_n_epochs"] = params.every_n_epochs if "every_n_epochs" in given or not others else None
    arguments["train_time_interval"] = None if interval is None else _time_call(interval)
    states = params.save_last_n_optim_states
    arguments["save_last_n_optim_states"] = -1 if states is None else states
    arguments["save_on_sigterm"] = bool(section.config.create_preemption_callback)
    arguments |= _place(params, section, notes)
    if params.model_parallel_size is not None:
        notes.warn(
            f"{PARAMS}.model_parallel_size", "has no effect: the trainer's strategy knows how the model is split"
        )
    _note_export(params, given, notes)
    return Call(Name("nemologger", "ModelCheckpoint"), arguments)


def export_call(section: Section) -> list[Call]:
    """Makes the callback that exports the model, if there is to be one."""
    params = _params(section)
    wanted = params.save_nemo_on_train_end or params.always_save_nemo
    if not section.config.create_checkpoint_callback or not wanted:
        return []
    return [
        Call(
            Name("nemologger.callbacks", "ExportModel"),
            {
                "prefix": section.config.name or "default" if params.prefix is None else params.prefix,
                "postfix": params.postfix,
                "best": params.save_best_model,
                "always": params.always_save_nemo,
                "at_end": bool(params.save_nemo_on_train_end),
            },
        )
    ]


def _params(section: Section) -> CallbackParams:
    return section.config.checkpoint_callback_params or CallbackParams()


def _place(params: CallbackParams, section: Section, notes: Notes) -> dict[str, Any]:
    dirpath, filename = params.dirpath, params.filename
    if params.filepath is not None:
        notes.tell(f"{PARAMS}.filepath", "is deprecated: its parts are dirpath and filename")
        path = Path(params.filepath)
        # Without a directory it names the file; NeMo 1 would write into the working directory.
        dirpath = dirpath or str(path.parent)
        filename = filename or path.name
    if filename is None and section.config.explicit_log_dir:
        # NeMoLogger has no name to begin it with.
        name, monitor = section.config.name or "default", params.monitor
        shown = "" if monitor is None or set(monitor) & set("{}:[]!") else f"{{{monitor}:.4f}}-"
        filename = f"{name}--{shown}{{epoch}}-{{step}}"
    if params.filename is None and params.filepath is None:
        notes.tell(
            f"{PARAMS}.filename",
            "also has the step in it, without which checkpoints of one epoch would be called the same",
        )
    return {"dirpath": dirpath, "filename": filename}


def _note_export(params: CallbackParams, given: set[str], notes: Notes) -> None:
    wanted = params.save_nemo_on_train_end or params.always_save_nemo
    if params.save_best_model and not wanted:
        notes.warn(
            f"{PARAMS}.save_best_model",
            "has no effect with save_nemo_on_train_end=False: nothing is exported. The best checkpoints are kept anyway",
        )
    elif not wanted:
        for key in sorted(given & {"prefix", "postfix"}):
            notes.warn(f"{PARAMS}.{key}", "has no effect with save_nemo_on_train_end=False: nothing is exported")
    if wanted and params.postfix == ".nemo" and given & set(_EXPORT):
        notes.tell(
            f"{PARAMS}.save_nemo_on_train_end",
            "writes a .nemo file only for a model that has save_to(); postfix='.safetensors' or '.pt' exports the weights "
            "of any model, and every checkpoint holds them too",
        )


_CLOCK = re.compile(r"(\d+):(\d{1,2}):(\d{1,2}):(\d{1,2})")


def _interval(value: Any) -> timedelta | None:
    """``train_time_interval`` as people write it."""
    if value is None or isinstance(value, timedelta):
        return value
    if isinstance(value, Mapping):
        target, parts = value.get("_target_", "datetime.timedelta"), {k: v for k, v in value.items() if k != "_target_"}
        try:
            if target == "datetime.timedelta":
                return timedelta(**parts)
        except TypeError:
            pass
    if isinstance(value, str) and (clock := _CLOCK.fullmatch(value.strip())):
        days, hours, minutes, seconds = map(int, clock.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    raise ConfigurationError(
        f"exp_manager.{PARAMS}.train_time_interval={value!r}: expected a datetime.timedelta, its arguments "
        '({"minutes": 30}, with or without "_target_": "datetime.timedelta"), or "DD:HH:MM:SS"'
    )


def _time_call(interval: timedelta) -> Call:
    parts = {"days": interval.days, "seconds": interval.seconds, "microseconds": interval.microseconds}
    return Call(Name("datetime", "timedelta"), {name: value for name, value in parts.items() if value})
