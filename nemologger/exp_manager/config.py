"""The fields of NeMo 1's ``exp_manager`` section, with its names, types and defaults; and how a section is read."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from nemologger.condition import did_you_mean
from nemologger.errors import ConfigurationError
from nemologger.resolvers import register_resolvers

# Names that NeMo 1's documentation has for fields that are called otherwise.
_ALIASES = {
    "ema.enabled": "enable",
    "straggler_detection_callback_params": "straggler_detection_params",
}
# "None", and what stands in a signature: NeMo 1's documentation has "run_id: Optional[str] = None" for a line of YAML.
_PYTHONS_NULL = re.compile(r"None|(?:(?:typing\.)?Optional\[.+\]|[\w.]+(?:\[.+\])? *\| *None) *= *None")


@dataclass
class EarlyStoppingParams:
    """Arguments of Lightning's EarlyStopping."""

    monitor: str = "val_loss"
    mode: str = "min"
    min_delta: float = 0.001
    patience: int = 10
    verbose: bool = True
    strict: bool = True
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_on_train_epoch_end: bool | None = None
    log_rank_zero_only: bool = False


@dataclass
class IPLEpochStopperParams:
    """Arguments of the callback that ends each start after some epochs."""

    enable_stop: bool = True
    stop_every_n_epochs: int = 1


@dataclass
class CallbackParams:
    """Arguments of the checkpoint callback."""

    filepath: str | None = None
    dirpath: str | None = None
    filename: str | None = None
    monitor: str | None = "val_loss"
    verbose: bool | None = True
    save_last: bool | None = True
    save_top_k: int | None = 3
    save_weights_only: bool | None = False
    mode: str | None = "min"
    auto_insert_metric_name: bool = True
    every_n_epochs: int | None = 1
    every_n_train_steps: int | None = None
    train_time_interval: Any = None
    prefix: str | None = None
    postfix: str = ".nemo"
    save_best_model: bool = False
    always_save_nemo: bool = False
    save_nemo_on_train_end: bool | None = True
    model_parallel_size: int | None = None
    save_on_train_epoch_end: bool | None = False
    async_save: bool | None = False
    save_last_n_optim_states: int | None = -1


@dataclass
class MLFlowParams:
    """Arguments of the MLflow logger."""

    experiment_name: str | None = None
    tracking_uri: str | None = None
    tags: dict[str, Any] | None = None
    save_dir: str | None = "./mlruns"
    prefix: str = ""
    artifact_location: str | None = None
    run_id: str | None = None
    log_model: bool = False


@dataclass
class DLLoggerParams:
    """Arguments of the DLLogger."""

    verbose: bool | None = False
    stdout: bool | None = False
    json_file: str | None = "./dllogger.json"


@dataclass
class ClearMLParams:
    """Arguments of the ClearML logger."""

    project: str | None = None
    task: str | None = None
    connect_pytorch: bool | None = False
    model_name: str | None = None
    tags: list[str] | None = None
    log_model: bool | None = False
    log_cfg: bool | None = False
    log_metrics: bool | None = False


@dataclass
class StepTimingParams:
    """How step times are measured."""

    reduction: str | None = "mean"
    sync_cuda: bool | None = False
    buffer_size: int | None = 1


@dataclass
class EMAParams:
    """Arguments of the moving average of the weights; ``enabled`` is accepted for ``enable``."""

    enable: bool | None = False
    decay: float | None = 0.999
    cpu_offload: bool | None = False
    validate_original_weights: bool | None = False
    every_n_steps: int = 1


@dataclass
class StragglerDetectionParams:
    """Arguments of the straggler detection."""

    report_time_interval: float = 300
    calc_relative_gpu_perf: bool = True
    calc_individual_gpu_perf: bool = True
    num_gpu_perf_scores_to_log: int = 5
    gpu_relative_perf_threshold: float = 0.7
    gpu_individual_perf_threshold: float = 0.7
    stop_if_detected: bool = False


@dataclass
class FaultToleranceParams:
    """Arguments of the fault tolerance; times in seconds."""

    workload_check_interval: float = 5.0
    initial_rank_heartbeat_timeout: float | None = 60.0 * 60.0
    rank_heartbeat_timeout: float | None = 45.0 * 60.0
    calculate_timeouts: bool = True
    safety_factor: float = 5.0
    rank_termination_signal: signal.Signals = signal.SIGKILL if os.name != "nt" else signal.SIGTERM
    log_level: str = "INFO"
    max_rank_restarts: int = 0
    max_subsequent_job_failures: int = 0
    additional_ft_launcher_args: str = ""
    simulated_fault: Any = None


@dataclass
class ExpManagerConfig:
    """The ``exp_manager`` section of a NeMo 1 configuration.

    It can be the schema of a section in a structured configuration. The README says what each field turns into.

    Example:
        >>> OmegaConf.structured(ExpManagerConfig).checkpoint_callback_params.save_top_k
        3
    """

    explicit_log_dir: str | None = None
    exp_dir: str | None = None
    name: str | None = None
    version: str | None = None
    use_datetime_version: bool | None = True
    resume_if_exists: bool | None = False
    resume_past_end: bool | None = False
    resume_ignore_no_checkpoint: bool | None = False
    resume_from_checkpoint: str | None = None
    create_tensorboard_logger: bool | None = True
    summary_writer_kwargs: dict[Any, Any] | None = None
    create_wandb_logger: bool | None = False
    wandb_logger_kwargs: dict[Any, Any] | None = None
    create_mlflow_logger: bool | None = False
    mlflow_logger_kwargs: MLFlowParams | None = field(default_factory=MLFlowParams)
    create_dllogger_logger: bool | None = False
    dllogger_logger_kwargs: DLLoggerParams | None = field(default_factory=DLLoggerParams)
    create_clearml_logger: bool | None = False
    clearml_logger_kwargs: ClearMLParams | None = field(default_factory=ClearMLParams)
    create_neptune_logger: bool | None = False
    neptune_logger_kwargs: dict[Any, Any] | None = None
    create_checkpoint_callback: bool | None = True
    checkpoint_callback_params: CallbackParams | None = field(default_factory=CallbackParams)
    create_early_stopping_callback: bool | None = False
    early_stopping_callback_params: EarlyStoppingParams | None = field(default_factory=EarlyStoppingParams)
    create_ipl_epoch_stopper_callback: bool | None = False
    ipl_epoch_stopper_callback_params: IPLEpochStopperParams | None = field(default_factory=IPLEpochStopperParams)
    create_preemption_callback: bool | None = True
    files_to_copy: list[str] | None = None
    log_step_timing: bool | None = True
    log_delta_step_timing: bool | None = False
    step_timing_kwargs: StepTimingParams | None = field(default_factory=StepTimingParams)
    log_local_rank_0_only: bool | None = False
    log_global_rank_0_only: bool | None = False
    disable_validation_on_resume: bool | None = True
    ema: EMAParams | None = field(default_factory=EMAParams)
    max_time_per_run: str | None = None
    seconds_to_sleep: float = 5
    create_straggler_detection_callback: bool | None = False
    straggler_detection_params: StragglerDetectionParams | None = field(default_factory=StragglerDetectionParams)
    create_fault_tolerance_callback: bool | None = False
    fault_tolerance: FaultToleranceParams | None = field(default_factory=FaultToleranceParams)
    log_tflops_per_sec_per_gpu: bool | None = True


# The nested section of each field that has one; a section that is null has its defaults.
NESTED: dict[str, Any] = {
    one.name: one.default_factory for one in fields(ExpManagerConfig) if isinstance(one.default_factory, type)
}


@dataclass(frozen=True)
class Section:
    """A section that was read and is valid.

    Attributes:
        config: Its values, and defaults for the rest. No nested section is None.
        given: The fields that it has a value for, nested ones as ``"ema.decay"``. In a section that has this schema every
            field has one, so there these are the fields whose value is not NeMo 1's default.
        as_null: The fields whose value is a text that means null in Python, as NeMo 1's documentation has it; by that text.
    """

    config: ExpManagerConfig
    given: frozenset[str]
    as_null: Mapping[str, str] = field(default_factory=dict)

    def asks_for(self, name: str) -> list[str]:
        """What it has below ``name``, or for it, that is not as good as nothing: NeMo 1's default, or null or false."""
        keys = [key for key in self.given if key == name or key.startswith(f"{name}.")]
        return sorted(key for key in keys if _says_something(attrgetter(key)(self.config), default_of(key)))


def read(cfg: Mapping[Any, Any] | DictConfig) -> Section:
    """Resolve and check a section.

    Raises:
        ConfigurationError: ``cfg`` is no mapping, gives one field twice, or a time without the quotes that YAML wants.
        OmegaConfBaseException: A key is unknown, missing, of the wrong type, or its interpolation fails; it names the key.
    """
    if not isinstance(cfg, DictConfig):
        if not isinstance(cfg, Mapping):
            raise ConfigurationError(
                f"cfg is a {type(cfg).__qualname__}: exp_manager needs a dict or a DictConfig, the section itself: "
                'exp_manager(trainer, cfg.get("exp_manager"))'
            )
        cfg = OmegaConf.create(dict(cfg), flags={"allow_objects": True})
    register_resolvers()
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    if not isinstance(plain, dict):
        raise ConfigurationError("cfg is a DictConfig without a value: exp_manager needs a section with keys")
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in plain.items()}
    _rename_aliases(plain)
    as_null = _make_null(plain)
    _check_duration("max_time_per_run", plain)
    _check_duration("train_time_interval", plain.get("checkpoint_callback_params"), "checkpoint_callback_params.")
    for name, kind in NESTED.items():  # OmegaConf's error for these does not say which key it is about
        if not isinstance(plain.get(name), (dict, type(None))):
            keys = ", ".join(one.name for one in fields(kind))
            raise ConfigurationError(f"exp_manager.{name}={plain[name]!r}: expected a section with the keys {keys}")
    given = OmegaConf.create(plain, flags={"allow_objects": True})
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ExpManagerConfig), given)
    except ConfigKeyError as error:
        if "exp_manager" in plain:
            raise ConfigurationError(
                "cfg is all of a configuration: exp_manager needs the section itself: exp_manager(trainer, cfg.exp_manager)"
            ) from error
        section: Any = error.object_type
        error.msg = f"{error.msg}{did_you_mean(str(error.key), [one.name for one in fields(section)])}"
        raise
    config = OmegaConf.to_object(merged)
    if not isinstance(config, ExpManagerConfig):
        raise ConfigurationError(f"cfg is no exp_manager section: {plain!r}")
    for name, kind in NESTED.items():
        if getattr(config, name) is None:
            setattr(config, name, kind())
    return Section(config, frozenset(_given(cfg, plain, config)), as_null)


def default_of(key: str) -> Any:
    """What NeMo 1 has for the field ``key`` when nobody sets it."""
    value = attrgetter(key)(ExpManagerConfig())
    return None if is_dataclass(value) else value


def plain(section: Any) -> dict[str, Any]:
    """A nested section, none of which is None in a :class:`Section`, as a dictionary of its own."""
    return asdict(section)


def _says_something(value: Any, default: Any) -> bool:
    return any(map(bool, value.values())) if isinstance(value, Mapping) else value != default


def _rename_aliases(plain: dict[Any, Any]) -> None:
    for path, name in _ALIASES.items():
        *above, alias = path.split(".")
        section: Any = plain
        for step in above:
            section = section.get(step)
        if not isinstance(section, dict) or alias not in section:
            continue
        if name in section and section[name] != section[alias]:
            raise ConfigurationError(
                f"exp_manager.{path}={section[alias]!r} is another name of {name}={section[name]!r}: give one of them"
            )
        section[name] = section.pop(alias)


def _make_null(section: dict[Any, Any], above: str = "") -> dict[str, str]:
    """Null for the texts that are Python's for it; YAML reads only ``null`` and ``~`` so. Returns them by their keys."""
    found: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, dict) and not above:
            found |= _make_null(value, f"{key}.")
        elif isinstance(value, str) and _PYTHONS_NULL.fullmatch(value.strip()):
            found[f"{above}{key}"] = value
            section[key] = None
    return found


def _check_duration(key: str, section: Any, above: str = "") -> None:
    """Refuse a time whose colons YAML has taken away.

    Raises:
        ConfigurationError: It is a number that YAML makes of one.
    """
    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(value, bool) or not str(value).isdecimal():
        return
    rest, parts = int(str(value)), []
    for _ in range(3):
        rest, part = divmod(rest, 60)
        parts.append(f"{part:02}")
    if rest:
        meant = ":".join([f"{rest:02}", *reversed(parts)])
        raise ConfigurationError(
            f"exp_manager.{above}{key}={value}: expected DD:HH:MM:SS. YAML reads {meant} without quotes as this number, to "
            f'base 60; write {key}: "{meant}"'
        )


def _given(cfg: DictConfig, plain: dict[Any, Any], config: ExpManagerConfig) -> Iterator[str]:
    is_schema = _is_filled_in(cfg)
    for key, value in plain.items():
        if key not in NESTED:
            if not is_schema or getattr(config, key) != default_of(key):
                yield key
            continue
        is_filled_in = is_schema or _is_filled_in(cfg.get(key))
        for inner in value or {}:
            if not is_filled_in or getattr(getattr(config, key), inner) != default_of(f"{key}.{inner}"):
                yield f"{key}.{inner}"


def _is_filled_in(section: Any) -> bool:
    """Whether a dataclass, and not its author, gave ``section`` its keys."""
    if not isinstance(section, DictConfig):
        return False
    # A schema that went through to_container() or asdict() has lost its type, and has all of the keys.
    return is_dataclass(OmegaConf.get_type(section)) or {one.name for one in fields(ExpManagerConfig)} <= {*section}
