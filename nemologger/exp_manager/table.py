"""What became of each field: the table of the README, and the head of a migrated file."""

from __future__ import annotations

NEW_HOMES: dict[str, str] = {
    "explicit_log_dir": "NeMoLogger(explicit_log_dir=)",
    "exp_dir": "NeMoLogger(log_dir=)",
    "name": "NeMoLogger(name=)",
    "version": "NeMoLogger(version=)",
    "use_datetime_version": "NeMoLogger(use_datetime_version=, number_versions=True if False)",
    "resume_if_exists": "AutoResume(resume_if_exists=)",
    "resume_past_end": "AutoResume(resume_past_end=)",
    "resume_ignore_no_checkpoint": "AutoResume(resume_ignore_no_checkpoint=)",
    "resume_from_checkpoint": "AutoResume(resume_from_path=), with resume_if_exists AutoResume(start_from=)",
    "create_tensorboard_logger": "NeMoLogger(tensorboard=TensorBoardLogger(...))",
    "summary_writer_kwargs": "arguments of that TensorBoardLogger",
    "create_wandb_logger": "NeMoLogger(wandb=WandbLogger(...))",
    "wandb_logger_kwargs": "arguments of that WandbLogger",
    "create_mlflow_logger": "NeMoLogger(extra_loggers=[trackers.MLFlowLogger(...)])",
    "mlflow_logger_kwargs.*": "MLFlowLogger, the same name",
    "create_dllogger_logger": "NeMoLogger(extra_loggers=[trackers.DLLogger(...)])",
    "dllogger_logger_kwargs.*": "DLLogger, the same name",
    "create_clearml_logger": "NeMoLogger(extra_loggers=[trackers.ClearMLLogger(...)])",
    "clearml_logger_kwargs.*": "ClearMLLogger, the same name",
    "create_neptune_logger": "an error: the service has closed",
    "neptune_logger_kwargs": "none: the service has closed",
    "create_checkpoint_callback": "NeMoLogger(ckpt=ModelCheckpoint(...))",
    "checkpoint_callback_params.filepath": "ModelCheckpoint(dirpath=, filename=)",
    "checkpoint_callback_params.prefix": "callbacks.ExportModel(prefix=)",
    "checkpoint_callback_params.postfix": "callbacks.ExportModel(postfix=)",
    "checkpoint_callback_params.save_best_model": "callbacks.ExportModel(best=)",
    "checkpoint_callback_params.always_save_nemo": "callbacks.ExportModel(always=)",
    "checkpoint_callback_params.save_nemo_on_train_end": "callbacks.ExportModel(at_end=)",
    "checkpoint_callback_params.model_parallel_size": "none: the trainer's strategy knows",
    "checkpoint_callback_params.*": "ModelCheckpoint, the same name",
    "create_early_stopping_callback": "Trainer(callbacks=[EarlyStopping(...)])",
    "early_stopping_callback_params.*": "Lightning's EarlyStopping, the same name",
    "create_ipl_epoch_stopper_callback": "Trainer(callbacks=[callbacks.IPLEpochStopper(...)])",
    "ipl_epoch_stopper_callback_params.*": "IPLEpochStopper, the same name",
    "create_preemption_callback": (
        "Trainer(callbacks=[callbacks.PreemptionCallback()]), ModelCheckpoint(save_on_sigterm=False) if False"
    ),
    "files_to_copy": "NeMoLogger(files_to_copy=)",
    "log_step_timing": "Trainer(callbacks=[callbacks.TimingCallback(...)])",
    "log_delta_step_timing": "Trainer(callbacks=[callbacks.DeltaTimingCallback(...)])",
    "step_timing_kwargs.*": "timer_kwargs= of TimingCallback or DeltaTimingCallback",
    "log_local_rank_0_only": "NeMoLogger(log_local_rank_0_only=)",
    "log_global_rank_0_only": "NeMoLogger(log_global_rank_0_only=)",
    "disable_validation_on_resume": "Trainer(callbacks=[callbacks.SkipValidationOnResume()])",
    "ema.enable": "Trainer(callbacks=[callbacks.EMA(...)])",
    "ema.*": "EMA, the same name",
    "max_time_per_run": "Trainer(callbacks=[callbacks.MaxTimePerRun(...)])",
    "seconds_to_sleep": "none: the ranks wait for rank 0's decision, no longer",
    "create_straggler_detection_callback": "Trainer(callbacks=[callbacks.StragglerDetection(...)])",
    "straggler_detection_params.*": "StragglerDetection, the same name",
    "create_fault_tolerance_callback": "Trainer(callbacks=[callbacks.FaultTolerance(...)])",
    "fault_tolerance.*": "FaultTolerance, the same name",
    "log_tflops_per_sec_per_gpu": "Trainer(callbacks=[callbacks.FLOPsMeasurement()])",
}


def new_home(key: str) -> str:
    """What became of the field ``key``, nested ones as ``"ema.decay"``.

    Example:
        >>> new_home("ema.decay")
        'EMA, the same name'
    """
    section = key.partition(".")[0]
    return NEW_HOMES.get(key) or NEW_HOMES[f"{section}.*"]
