"""Every field reaches the plan, or the author is told what became of it."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.sections import all_keys

from nemologger.exp_manager.config import NESTED, ExpManagerConfig, default_of, read
from nemologger.exp_manager.plan import TrainerLogger, translate
from nemologger.exp_manager.source import expression
from nemologger.exp_manager.table import NEW_HOMES, new_home

# What turns on the part of the section that a field belongs to.
SWITCHES = {
    "summary_writer_kwargs": {"create_tensorboard_logger": True},
    "wandb_logger_kwargs": {"create_wandb_logger": True},
    "mlflow_logger_kwargs": {"create_mlflow_logger": True},
    "dllogger_logger_kwargs": {"create_dllogger_logger": True},
    "clearml_logger_kwargs": {"create_clearml_logger": True},
    "neptune_logger_kwargs": {"create_neptune_logger": True},
    "early_stopping_callback_params": {"create_early_stopping_callback": True},
    "ipl_epoch_stopper_callback_params": {"create_ipl_epoch_stopper_callback": True},
    "step_timing_kwargs": {"log_step_timing": True},
    "ema": {"ema": {"enable": True}},
    "straggler_detection_params": {"create_straggler_detection_callback": True},
    "fault_tolerance": {"create_fault_tolerance_callback": True},
}
# A value that is not the default, where the type of the default does not say one.
VALUES: dict[str, Any] = {
    "version": "v", "files_to_copy": ["a.txt"], "summary_writer_kwargs": {"flush_secs": 3},
    "wandb_logger_kwargs": {"name": "n", "project": "p"}, "neptune_logger_kwargs": {"project": "p"},
    "mlflow_logger_kwargs.tags": {"a": "b"}, "clearml_logger_kwargs.tags": ["a"],
    "checkpoint_callback_params.train_time_interval": {"hours": 1}, "checkpoint_callback_params.mode": "max",
    "checkpoint_callback_params.every_n_epochs": 2, "checkpoint_callback_params.every_n_train_steps": 7,
    "checkpoint_callback_params.model_parallel_size": 2, "checkpoint_callback_params.save_last_n_optim_states": 3,
    "early_stopping_callback_params.stopping_threshold": 0.1, "early_stopping_callback_params.mode": "max",
    "early_stopping_callback_params.divergence_threshold": 9.0,
    "early_stopping_callback_params.check_on_train_epoch_end": True, "step_timing_kwargs.reduction": "max",
    "max_time_per_run": "00:00:01:00", "fault_tolerance.rank_termination_signal": "SIGTERM",
    "fault_tolerance.log_level": "DEBUG", "fault_tolerance.simulated_fault": {"fault_type": "rank_killed"},
}  # fmt: skip


def other_value(key: str) -> Any:
    default = default_of(key)
    if key in VALUES:
        return VALUES[key]
    if isinstance(default, bool):
        return not default
    return default + 1 if isinstance(default, (int, float)) else "other"


def with_key(key: str, value: Any) -> dict[str, Any]:
    section = copy.deepcopy(SWITCHES.get(key.partition(".")[0], {}))
    outer, _, inner = key.partition(".")
    if inner:
        section.setdefault(outer, {})[inner] = value
    else:
        section[key] = value
    return section


def as_text(section: dict[str, Any]) -> str:
    plan = translate(read(section))
    notes = [str(note) for note in plan.notes.notes]
    return repr((plan.first, plan.callbacks, plan.log, plan.resume, notes))


@pytest.mark.parametrize("key", all_keys())
def test_no_field_is_dropped_in_silence(key):
    changed = with_key(key, other_value(key))
    same = {} if key == "ema.enable" else copy.deepcopy(SWITCHES.get(key.partition(".")[0], {}))
    assert as_text(changed) != as_text(same), f"{key} changes nothing and nobody is told"


@pytest.mark.parametrize("key", all_keys())
def test_every_field_has_a_new_home(key):
    assert new_home(key)


def test_no_home_is_of_a_field_that_is_not_there():
    for key in NEW_HOMES:
        section, _, inner = key.partition(".")
        assert section in {f.name for f in fields(ExpManagerConfig)}
        assert inner in ("", "*") or inner in {f.name for f in fields(NESTED[section])}


@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {"ema"}))
def test_parameters_of_something_that_is_off_are_reported(switch):
    off = dict.fromkeys(SWITCHES[switch], False)
    inner = next((key for key in all_keys() if key.startswith(f"{switch}.")), switch)
    value = other_value(inner)
    section = {switch: {inner.partition(".")[2]: value} if "." in inner else value, **off}
    assert f"exp_manager.{switch} has no effect: {next(iter(off))} is off" in as_text(section)


def test_a_moving_average_that_is_off_is_reported():
    assert "exp_manager.ema has no effect: ema.enable is off" in as_text({"ema": {"decay": 0.5}})
    assert "exp_manager.ema has" not in as_text({"ema": {"enable": False}})


def test_what_asks_for_nothing_is_not_reported():
    """NeMo 1's examples have these lines, for somebody to fill in."""
    section = {
        "wandb_logger_kwargs": {"name": None, "project": None, "offline": False, "tags": None},
        "neptune_logger_kwargs": {"project": None, "log_model_checkpoints": False},
        "early_stopping_callback_params": {"monitor": "val_loss", "mode": "min", "patience": 10},
        "ema": {"enable": False, "decay": 0.999},
        "mlflow_logger_kwargs": {"experiment_name": None, "save_dir": "./mlruns"},
    }
    assert translate(read(section)).notes.of("warned") == []


def test_a_name_with_a_slash_says_where_the_run_is():
    plan = translate(read({"name": "asr/quartz", "exp_dir": "runs", "create_mlflow_logger": True}))
    log = plan.log.arguments
    assert (log["log_dir"], log["name"]) == ("runs/asr", "quartz")
    assert log["extra_loggers"][0].arguments["experiment_name"] == "asr/quartz"
    assert translate(read({"name": "asr/quartz/"})).log.arguments["log_dir"] == "nemo_experiments/asr"
    plan = translate(read({"name": "asr/quartz", "explicit_log_dir": "here"}))
    assert (plan.log.arguments["name"], plan.notes.of("warned")) == ("quartz", [])


def test_the_plan_of_a_trainer_that_has_a_logger():
    plan = translate(read({"create_tensorboard_logger": False}), TrainerLogger("/logs", "n", "version_3"))
    assert expression(plan.log).startswith(
        'nl.NeMoLogger(\n    name="n",\n    log_dir="/logs",\n    version="version_3",\n    update_logger_directory=False,'
    )


def test_the_readme_has_the_whole_table():
    """Old key and new home of every row stand side by side in the README."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    missing = [key for key, home in NEW_HOMES.items() if f"| `{key}` | {home} |" not in readme]
    assert not missing
