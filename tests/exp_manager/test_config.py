from __future__ import annotations

import re
import signal
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import pytest
from helpers.sections import all_keys
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationKeyError, MissingMandatoryValue, ValidationError

from nemologger import exp_manager as module
from nemologger.errors import ConfigurationError
from nemologger.exp_manager import ExpManagerConfig
from nemologger.exp_manager.config import (
    NESTED,
    CallbackParams,
    ClearMLParams,
    EMAParams,
    MLFlowParams,
    default_of,
    read,
)
from nemologger.exp_manager.plan import translate

# Names and defaults as NeMo 1's nemo/utils/exp_manager.py (and nemo/utils/loggers/*.py) has them.
TOP = {
    "explicit_log_dir": None, "exp_dir": None, "name": None, "version": None, "use_datetime_version": True,
    "resume_if_exists": False, "resume_past_end": False, "resume_ignore_no_checkpoint": False,
    "resume_from_checkpoint": None, "create_tensorboard_logger": True, "summary_writer_kwargs": None,
    "create_wandb_logger": False, "wandb_logger_kwargs": None, "create_mlflow_logger": False,
    "create_dllogger_logger": False, "create_clearml_logger": False, "create_neptune_logger": False,
    "neptune_logger_kwargs": None, "create_checkpoint_callback": True, "create_early_stopping_callback": False,
    "create_ipl_epoch_stopper_callback": False,
    "create_preemption_callback": True, "files_to_copy": None, "log_step_timing": True,
    "log_delta_step_timing": False, "log_local_rank_0_only": False, "log_global_rank_0_only": False,
    "disable_validation_on_resume": True, "max_time_per_run": None, "seconds_to_sleep": 5,
    "create_straggler_detection_callback": False, "create_fault_tolerance_callback": False,
    "log_tflops_per_sec_per_gpu": True,
}  # fmt: skip
INNER = {
    "mlflow_logger_kwargs": {
        "experiment_name": None, "tracking_uri": None, "tags": None, "save_dir": "./mlruns", "prefix": "",
        "artifact_location": None, "run_id": None, "log_model": False,
    },
    "dllogger_logger_kwargs": {"verbose": False, "stdout": False, "json_file": "./dllogger.json"},
    "clearml_logger_kwargs": {
        "project": None, "task": None, "connect_pytorch": False, "model_name": None, "tags": None, "log_model": False,
        "log_cfg": False, "log_metrics": False,
    },
    "checkpoint_callback_params": {
        "filepath": None, "dirpath": None, "filename": None, "monitor": "val_loss", "verbose": True, "save_last": True,
        "save_top_k": 3, "save_weights_only": False, "mode": "min", "auto_insert_metric_name": True,
        "every_n_epochs": 1, "every_n_train_steps": None, "train_time_interval": None, "prefix": None,
        "postfix": ".nemo", "save_best_model": False, "always_save_nemo": False, "save_nemo_on_train_end": True,
        "model_parallel_size": None, "save_on_train_epoch_end": False, "async_save": False,
        "save_last_n_optim_states": -1,
    },
    "early_stopping_callback_params": {
        "monitor": "val_loss", "mode": "min", "min_delta": 0.001, "patience": 10, "verbose": True, "strict": True,
        "check_finite": True, "stopping_threshold": None, "divergence_threshold": None,
        "check_on_train_epoch_end": None, "log_rank_zero_only": False,
    },
    "ipl_epoch_stopper_callback_params": {"enable_stop": True, "stop_every_n_epochs": 1},
    "step_timing_kwargs": {"reduction": "mean", "sync_cuda": False, "buffer_size": 1},
    "ema": {
        "enable": False, "decay": 0.999, "cpu_offload": False, "validate_original_weights": False, "every_n_steps": 1,
    },
    "straggler_detection_params": {
        "report_time_interval": 300, "calc_relative_gpu_perf": True, "calc_individual_gpu_perf": True,
        "num_gpu_perf_scores_to_log": 5, "gpu_relative_perf_threshold": 0.7, "gpu_individual_perf_threshold": 0.7,
        "stop_if_detected": False,
    },
    "fault_tolerance": {
        "workload_check_interval": 5.0, "initial_rank_heartbeat_timeout": 3600.0, "rank_heartbeat_timeout": 2700.0,
        "calculate_timeouts": True, "safety_factor": 5.0, "rank_termination_signal": signal.SIGKILL,
        "log_level": "INFO", "max_rank_restarts": 0, "max_subsequent_job_failures": 0,
        "additional_ft_launcher_args": "", "simulated_fault": None,
    },
}  # fmt: skip


def test_the_fields_and_defaults_are_those_of_nemo_1():
    assert {f.name for f in fields(ExpManagerConfig)} == {*TOP, *INNER}
    assert set(NESTED) == set(INNER)
    assert {key: default_of(key) for key in TOP} == TOP
    for section, inner in INNER.items():
        assert {f.name: default_of(f"{section}.{f.name}") for f in fields(NESTED[section])} == inner
    assert set(all_keys()) == {*TOP, *(f"{section}.{key}" for section, inner in INNER.items() for key in inner)}


def test_it_is_a_schema_for_structured_configurations():
    schema = OmegaConf.create({"exp_manager": OmegaConf.structured(ExpManagerConfig)})
    merged = OmegaConf.merge(schema, {"exp_manager": {"name": "n", "ema": {"decay": 0.5}}})
    assert read(merged.exp_manager).config.ema.decay == 0.5
    with pytest.raises(ConfigKeyError, match=r"full_key: exp_manager\.nam"):
        OmegaConf.merge(schema, {"exp_manager": {"nam": "n"}})


FEW = {
    "name": "n",
    "create_clearml_logger": False,
    "ema": {"decay": 0.999},
    "checkpoint_callback_params": {"every_n_train_steps": 100, "save_nemo_on_train_end": False},
}


@dataclass
class OwnSection:
    """What a user may have as a schema: the fields that are needed."""

    name: str | None = None
    create_clearml_logger: bool = False
    ema: EMAParams = field(default_factory=EMAParams)
    checkpoint_callback_params: CallbackParams = field(default_factory=CallbackParams)


def merged(schema, section=FEW) -> DictConfig:
    return OmegaConf.merge(OmegaConf.create({"exp_manager": OmegaConf.structured(schema)}), {"exp_manager": section})


FILLED_IN = {
    "schema": lambda: merged(ExpManagerConfig).exp_manager,
    "container": lambda: OmegaConf.to_container(merged(ExpManagerConfig).exp_manager),
    "asdict": lambda: asdict(OmegaConf.to_object(merged(ExpManagerConfig).exp_manager)),
    "own schema": lambda: merged(OwnSection).exp_manager,
    "nested schema": lambda: {**FEW, "ema": merged(OwnSection).exp_manager.ema, "checkpoint_callback_params":
        OmegaConf.merge(OmegaConf.structured(CallbackParams), FEW["checkpoint_callback_params"])},
}  # fmt: skip


@pytest.mark.parametrize("how", FILLED_IN)
def test_what_a_schema_fills_in_is_not_given(how):
    section = read(FILLED_IN[how]())
    given = {f"checkpoint_callback_params.{key}" for key in ("every_n_train_steps", "save_nemo_on_train_end")}
    assert section.given - {"create_clearml_logger"} == {"name", *given}
    plan = translate(section)
    assert [str(note) for note in plan.notes.of("warned")] == []
    assert plan.log.arguments["ckpt"].make()._every_n_train_steps == 100  # with two intervals it is an error


def test_what_is_written_down_is_given_whatever_its_value():
    section = read({**FEW, "checkpoint_callback_params": {"every_n_train_steps": 100, "every_n_epochs": 1}})
    assert {"create_clearml_logger", "ema.decay", "checkpoint_callback_params.every_n_epochs"} <= section.given


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"expdir": "x"}, ConfigKeyError, "(?s)full_key: expdir.*did you mean 'exp_dir'"),
        (
            {"checkpoint_callback_params": {"save_topk": 3}},
            ConfigKeyError,
            r"(?s)full_key: checkpoint_callback_params\.save_topk.*did you mean 'save_top_k'",
        ),
        ({"trainer": {}, "exp_manager": {}}, ConfigurationError, r"exp_manager\(trainer, cfg\.exp_manager\)"),
        ({"resume_if_exists": "maybe"}, ValidationError, "full_key: resume_if_exists"),
        ({"ema": {"decay": "slow"}}, ValidationError, r"full_key: ema\.decay"),
        ({"ema": 3}, ConfigurationError, r"exp_manager\.ema=3: expected a section with the keys enable, decay"),
        ({"name": "${model_name}"}, InterpolationKeyError, "full_key: name"),
        ({"exp_dir": "???"}, MissingMandatoryValue, "full_key: exp_dir"),
        ({"fault_tolerance": {"rank_termination_signal": "SIGNONE"}}, ValidationError, "rank_termination_signal"),
    ],
)
@pytest.mark.parametrize("kind", [dict, OmegaConf.create])
def test_what_is_wrong_is_named(section, error, message, kind):
    with pytest.raises(error, match=message):
        read(kind(section))


@pytest.mark.parametrize("cfg", ["exp.yaml", 3, ["name"], OmegaConf.create(["name"])])
def test_it_must_be_a_mapping(cfg):
    with pytest.raises(ConfigurationError, match="dict or a DictConfig"):
        read(cfg)


def test_interpolations_reach_the_whole_configuration(monkeypatch):
    monkeypatch.setenv("RUNS", "/runs")
    whole = OmegaConf.create({"name": "conformer", "exp_manager": {"name": "${name}", "exp_dir": "${oc.env:RUNS}"}})
    config = read(whole.exp_manager).config
    assert (config.name, config.exp_dir) == ("conformer", "/runs")
    assert whole.exp_manager._content["name"]._value() == "${name}"  # the caller's configuration is as it was


def test_values_are_converted_and_null_sections_have_their_defaults():
    section = read(
        {
            "version": 957,
            "exp_dir": Path("/runs"),
            "resume_if_exists": "yes",
            "ema": None,
            "fault_tolerance": {"rank_termination_signal": 15},
            "checkpoint_callback_params": {"train_time_interval": timedelta(minutes=1)},
        }
    )
    assert (section.config.version, section.config.exp_dir, section.config.resume_if_exists) == ("957", "/runs", True)
    assert section.config.ema.decay == 0.999
    assert section.config.fault_tolerance.rank_termination_signal is signal.SIGTERM
    assert section.config.checkpoint_callback_params.train_time_interval == timedelta(minutes=1)
    assert "checkpoint_callback_params.train_time_interval" in section.given
    assert "ema.decay" not in section.given


def test_the_names_in_nemos_documentation_are_accepted():
    assert read({"ema": {"enabled": True}}).config.ema.enable is True
    assert read({"ema": {"enabled": True, "enable": True}}).config.ema.enable is True
    section = read({"straggler_detection_callback_params": {"report_time_interval": 9}})
    assert section.config.straggler_detection_params.report_time_interval == 9
    with pytest.raises(ConfigurationError, match=r"ema\.enabled=False is another name of enable=True"):
        read({"ema": {"enabled": False, "enable": True}})


# Lines as NeMo's documentation has them.
TEXTS = """
name: None
files_to_copy: None
wandb_logger_kwargs: {project: None, tags: [None, a]}
mlflow_logger_kwargs:
    tags: {best: None}
    artifact_location: None
    # provide run_id if resuming a previously started run
    run_id: Optional[str] = None
clearml_logger_kwargs:
    project: None  # name of the project
    task: None  # optional name of task
    tags: None  # Should be a list of str
early_stopping_callback_params:
    stopping_threshold: float | None = None
version: dropout=None
"""


def test_pythons_null_is_null_and_its_author_is_told():
    section = read(OmegaConf.create(TEXTS))
    config = section.config
    assert (config.name, config.files_to_copy, config.version) == (None, None, "dropout=None")
    assert config.wandb_logger_kwargs == {"project": None, "tags": ["None", "a"]}
    assert config.mlflow_logger_kwargs == MLFlowParams(tags={"best": "None"})
    assert config.clearml_logger_kwargs == ClearMLParams()
    assert config.early_stopping_callback_params.stopping_threshold is None
    told = {note.key: str(note) for note in translate(section).notes.of("told") if "Write null" in str(note)}
    assert set(told) == {
        "name", "files_to_copy", "wandb_logger_kwargs.project", "mlflow_logger_kwargs.artifact_location",
        "mlflow_logger_kwargs.run_id", "clearml_logger_kwargs.project", "clearml_logger_kwargs.task",
        "clearml_logger_kwargs.tags", "early_stopping_callback_params.stopping_threshold",
    }  # fmt: skip
    assert told["mlflow_logger_kwargs.run_id"] == (
        "exp_manager.mlflow_logger_kwargs.run_id is the text 'Optional[str] = None', which YAML does not read as null; it "
        "is taken for it. Write null"
    )


def test_null_in_python_is_no_value_for_a_field_that_needs_one():
    with pytest.raises(ValidationError, match=r"full_key: checkpoint_callback_params\.postfix"):
        read({"checkpoint_callback_params": {"postfix": "None"}})


@pytest.mark.parametrize(
    "make", [OmegaConf.create, lambda text: merged(ExpManagerConfig, OmegaConf.create(text)).exp_manager]
)
@pytest.mark.parametrize("time", ["10:00:00:00", "1:02:03:04", "31:23:59:59"])
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("max_time_per_run: {}", "max_time_per_run"),
        ("checkpoint_callback_params: {{train_time_interval: {}}}", "checkpoint_callback_params.train_time_interval"),
    ],
)
def test_a_time_without_quotes_is_a_number_in_yaml(text, key, time, make):
    expected = rf'exp_manager\.{re.escape(key)}=\d+: expected.* {key.rpartition(".")[2]}: "0?{time}"'
    with pytest.raises(ConfigurationError, match=expected):
        read(make(text.format(time)))
    read(make(text.format(f'"{time}"')))


def test_the_module_can_be_used_both_ways():
    import nemologger
    from nemologger.exp_manager import exp_manager

    assert nemologger.exp_manager is module
    assert nemologger.exp_manager.exp_manager is exp_manager
