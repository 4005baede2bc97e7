"""What a section means: the calls that set the run up, and what its author should know about them. No I/O."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from nemologger import names
from nemologger.exp_manager import trackers
from nemologger.exp_manager.calls import Call, Name
from nemologger.exp_manager.checkpoints import checkpoint_call, export_call
from nemologger.exp_manager.config import ExpManagerConfig, Section, plain
from nemologger.exp_manager.notes import Notes

CALLBACKS = "nemologger.callbacks"


@dataclass(frozen=True)
class TrainerLogger:
    """The logger that a trainer came with; where it writes is where the run writes.

    Attributes:
        save_dir: The base directory; None if the logger has none.
        name: The experiment.
        version: The run.
    """

    save_dir: str | None
    name: str | None
    version: str | None


@dataclass(frozen=True)
class Plan:
    """The calls that a section stands for, in the order in which they are made.

    Attributes:
        first: Callbacks that come before those that the trainer has.
        callbacks: Callbacks that come after them.
        log: Makes a NeMoLogger.
        resume: Makes an AutoResume.
        notes: What differs from NeMo 1, or has no effect, or cannot work.
    """

    first: Sequence[Call]
    callbacks: Sequence[Call]
    log: Call
    resume: Call
    notes: Notes = field(default_factory=Notes)


def translate(section: Section, logger: TrainerLogger | None = None) -> Plan:
    """What ``section`` means for a trainer.

    Args:
        section: From :func:`nemologger.exp_manager.config.read`.
        logger: The trainer's own, if it has one.

    Example:
        >>> from nemologger.exp_manager.config import read
        >>> translate(read({"resume_if_exists": True})).resume.arguments["resume_if_exists"]
        True
    """
    notes = Notes()
    section = _without_directories(section, notes)
    config = section.config
    for key, written in section.as_null.items():
        notes.tell(key, f"is the text {written!r}, which YAML does not read as null; it is taken for it. Write null")
    loggers = trackers.calls(section, notes)
    ckpt = checkpoint_call(section, notes)
    callbacks = [*_callbacks(section, notes), *export_call(section)]
    _warn_of_switched_off(section, notes)
    return Plan(
        first=_timing(config),
        callbacks=callbacks,
        log=Call(
            Name("nemologger", "NeMoLogger"),
            {
                **_directory(section, logger, notes),
                "files_to_copy": config.files_to_copy,
                "log_local_rank_0_only": bool(config.log_local_rank_0_only),
                "log_global_rank_0_only": bool(config.log_global_rank_0_only),
                **loggers,
                **({} if ckpt is None else {"ckpt": ckpt}),
            },
        ),
        resume=Call(Name("nemologger", "AutoResume"), _resume(section, notes)),
        notes=notes,
    )


def _without_directories(section: Section, notes: Notes) -> Section:
    """``section`` with a name that is one: in NeMo 1 it may also say in which directory below the base one the run is."""
    config = section.config
    above, name = os.path.split((config.name or "").rstrip("/"))
    if not above:
        return section
    notes.tell(
        "name", f"has a directory in it, where the run is as in NeMo 1; its checkpoints begin with {name!r} alone"
    )
    mlflow: Any = config.mlflow_logger_kwargs
    mlflow = replace(mlflow, experiment_name=mlflow.experiment_name or config.name)
    base = None if config.explicit_log_dir else os.path.join(config.exp_dir or names.EXPERIMENTS, above)
    return replace(
        section, config=replace(config, name=name, exp_dir=base or config.exp_dir, mlflow_logger_kwargs=mlflow)
    )


def _directory(section: Section, logger: TrainerLogger | None, notes: Notes) -> dict[str, Any]:
    config = section.config
    if config.explicit_log_dir:
        ignored = [key for key in ("exp_dir", "version") if getattr(config, key)]
        for key in ignored:
            notes.warn(key, "has no effect: explicit_log_dir is the run directory itself")
        return {"name": config.name or "default", "explicit_log_dir": config.explicit_log_dir}
    if logger is not None:
        for key in ("version", "use_datetime_version"):
            if key in section.given:
                notes.warn(key, "has no effect: the run is where the trainer's logger writes")
        return {
            "name": logger.name or "default",
            "log_dir": logger.save_dir or config.exp_dir,
            "version": logger.version,
            "update_logger_directory": False,
        }
    return {
        "name": config.name or "default",
        "log_dir": config.exp_dir,
        "version": config.version,
        "use_datetime_version": bool(config.use_datetime_version),
        "number_versions": not config.use_datetime_version,
    }


def _resume(section: Section, notes: Notes) -> dict[str, Any]:
    config = section.config
    given = config.resume_from_checkpoint or None
    if given and not config.resume_if_exists:
        start = {"resume_from_path": given}
    elif given and config.resume_ignore_no_checkpoint:
        # As NeMo 1 does, whose documentation says the opposite: a chain of jobs would begin again with each of them.
        notes.tell(
            "resume_from_checkpoint", "is where the first run starts; once the run has checkpoints, they are used"
        )
        start = {"start_from": given}
    else:
        if given:
            notes.warn(
                "resume_from_checkpoint",
                "has no effect beside resume_if_exists, which asks for a checkpoint of the run itself; with "
                "resume_ignore_no_checkpoint=True it is where the first run starts",
            )
        start = {}
    if config.resume_past_end and not config.resume_if_exists:
        notes.warn("resume_past_end", "has no effect without resume_if_exists")
    if "seconds_to_sleep" in section.given:
        notes.tell("seconds_to_sleep", "is not needed: all ranks wait for what rank 0 decides, and for nothing longer")
    return {
        "resume_if_exists": bool(config.resume_if_exists),
        "resume_past_end": bool(config.resume_past_end),
        "resume_ignore_no_checkpoint": bool(config.resume_ignore_no_checkpoint),
        **start,
    }


def _timing(config: ExpManagerConfig) -> list[Call]:
    name = "DeltaTimingCallback" if config.log_delta_step_timing else "TimingCallback"
    if not (config.log_delta_step_timing or config.log_step_timing):
        return []
    return [Call(Name(CALLBACKS, name), {"timer_kwargs": plain(config.step_timing_kwargs)})]


def _callbacks(section: Section, notes: Notes) -> list[Call]:
    config = section.config
    calls: list[Call] = []

    def add(name: str, module: str = CALLBACKS, **arguments: Any) -> None:
        calls.append(Call(Name(module, name), arguments))

    ema = plain(config.ema)
    if ema.pop("enable"):
        add("EMA", **ema)
    if config.create_early_stopping_callback:
        add("EarlyStopping", "lightning.pytorch.callbacks", **plain(config.early_stopping_callback_params))
    if config.create_ipl_epoch_stopper_callback:
        add("IPLEpochStopper", **plain(config.ipl_epoch_stopper_callback_params))
    if config.create_preemption_callback and config.create_checkpoint_callback:
        add("PreemptionCallback")
    elif "create_preemption_callback" in section.given and config.create_preemption_callback:
        notes.warn(
            "create_preemption_callback", "has no effect with create_checkpoint_callback=False: it would not save"
        )
    if config.disable_validation_on_resume:
        add("SkipValidationOnResume")
    if config.max_time_per_run is not None:
        add("MaxTimePerRun", duration=config.max_time_per_run)
    if config.create_straggler_detection_callback:
        add("StragglerDetection", **plain(config.straggler_detection_params))
    if config.create_fault_tolerance_callback:
        faults = plain(config.fault_tolerance)
        faults["rank_termination_signal"] = faults["rank_termination_signal"].name
        add("FaultTolerance", **faults)
    if config.log_tflops_per_sec_per_gpu:
        add("FLOPsMeasurement")
    return calls


def _warn_of_switched_off(section: Section, notes: Notes) -> None:
    for switch, parameters in {**trackers.SWITCHES, **_SWITCHED}.items():
        also = switch == "log_step_timing" and section.config.log_delta_step_timing
        if not (attrgetter(switch)(section.config) or also) and section.asks_for(parameters):
            notes.warn(parameters, f"has no effect: {switch} is off")


_SWITCHED = {
    "log_step_timing": "step_timing_kwargs",
    "ema.enable": "ema",
    "create_early_stopping_callback": "early_stopping_callback_params",
    "create_ipl_epoch_stopper_callback": "ipl_epoch_stopper_callback_params",
    "create_straggler_detection_callback": "straggler_detection_params",
    "create_fault_tolerance_callback": "fault_tolerance",
}
