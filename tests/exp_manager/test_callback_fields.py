"""The callbacks that a section adds, with its parameters; what they do is tested where they are."""

from __future__ import annotations

import logging
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.sections import NO_CKPT, OFF, bare_trainer, checkpoints, ckpt, fit, one_of
from helpers.stopped import Watch
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_only
from toy import Scored

from nemologger import callbacks as ours
from nemologger.errors import ConfigurationError
from nemologger.exp_manager import clean_exp_ckpt, exp_manager
from nemologger.lightning_port import callbacks
from nemologger.run.record import close_log


def trainer_of(section, **options):
    """A trainer that was set up, and has not trained."""
    trainer = bare_trainer(**options)
    exp_manager(trainer, section)
    close_log(trainer)
    return trainer


def test_what_nemo_1_has_by_itself(tmp_path):
    trainer = trainer_of({"exp_dir": tmp_path})
    for name in ("TimingCallback", "PreemptionCallback", "SkipValidationOnResume", "FLOPsMeasurement"):
        assert one_of(trainer, getattr(ours, name)) is not None, name
    for name in ("DeltaTimingCallback", "EMA", "MaxTimePerRun", "StragglerDetection", "FaultTolerance"):
        assert one_of(trainer, getattr(ours, name)) is None, name
    assert one_of(trainer, EarlyStopping) is None


def test_a_run_with_all_that_is_on_by_itself(tmp_path):
    trainer = bare_trainer(log_every_n_steps=1)
    run = exp_manager(trainer, {"exp_dir": tmp_path})
    fit(trainer)
    assert "train_step_timing in s" in trainer.logged_metrics
    assert checkpoints(run)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("create_preemption_callback", "PreemptionCallback"),
        ("disable_validation_on_resume", "SkipValidationOnResume"),
        ("log_tflops_per_sec_per_gpu", "FLOPsMeasurement"),
        ("log_step_timing", "TimingCallback"),
        ("log_delta_step_timing", "DeltaTimingCallback"),
        ("create_early_stopping_callback", "EarlyStopping"),
        ("create_ipl_epoch_stopper_callback", "IPLEpochStopper"),
        ("create_straggler_detection_callback", "StragglerDetection"),
        ("create_fault_tolerance_callback", "FaultTolerance"),
    ],
)
def test_each_switch(tmp_path, key, name):
    base = {**OFF, "exp_dir": tmp_path}
    assert one_of(trainer_of({**base, key: False}), name) is None
    assert one_of(trainer_of({**base, key: True}), name) is not None


def test_delta_step_timing_takes_the_place_of_step_timing_and_comes_first(tmp_path):
    class Mine(Callback):
        pass

    kwargs = {"buffer_size": 7, "reduction": "max", "sync_cuda": True}
    section = {**NO_CKPT, "exp_dir": tmp_path, "log_step_timing": True, "step_timing_kwargs": kwargs}
    trainer = trainer_of(section, callbacks=[Mine()])
    assert [type(c).__name__ for c in callbacks(trainer)][:2] == ["TimingCallback", "Mine"]
    timer = one_of(trainer, "TimingCallback")._train
    timer.add(3.0)
    timer.add(1.0)
    assert (timer.buffer_size, timer.value) == (7, 3.0)
    assert timer._now is not time.perf_counter  # it waits for the GPU
    with pytest.raises(ConfigurationError, match="reduction"):
        trainer_of({**section, "step_timing_kwargs": {"reduction": "median"}})
    trainer = trainer_of({**section, "log_delta_step_timing": True})
    assert one_of(trainer, "TimingCallback") is None
    assert one_of(trainer, "DeltaTimingCallback") is not None


def test_ema(tmp_path):
    ema = {"enable": True, "decay": 0.5, "every_n_steps": 2, "validate_original_weights": True, "cpu_offload": True}
    callback = one_of(trainer_of({**ckpt(), "exp_dir": tmp_path, "ema": ema}), ours.EMA)
    assert (callback.decay, callback.every_n_steps) == (0.5, 2)
    assert (callback.validate_original_weights, callback.cpu_offload) == (True, True)


def test_early_stopping_stops(tmp_path):
    params = {"patience": 2, "min_delta": 0.0, "monitor": "val_loss", "check_finite": False, "mode": "min"}
    section = {
        **ckpt(every_n_train_steps=1, every_n_epochs=0),
        "exp_dir": tmp_path,
        "create_early_stopping_callback": True,
        "early_stopping_callback_params": params,
    }
    trainer = bare_trainer(max_steps=20, val_check_interval=1)
    exp_manager(trainer, section)
    callback = one_of(trainer, EarlyStopping)
    assert (callback.patience, callback.check_finite) == (2, False)
    fit(trainer, Scored(scores=[3.0, 1.0, 2.0, 2.0, 2.0]))
    assert trainer.global_step == 4  # the best at step 2, and two without progress


def test_all_that_early_stopping_takes(tmp_path):
    params = {
        "monitor": "train_loss", "mode": "max", "min_delta": 0.25, "patience": 7, "verbose": False, "strict": False,
        "check_finite": False, "stopping_threshold": 9.0, "divergence_threshold": -9.0,
        "check_on_train_epoch_end": True, "log_rank_zero_only": True,
    }  # fmt: skip
    section = {"create_early_stopping_callback": True, "early_stopping_callback_params": params}
    callback = one_of(trainer_of({**ckpt(), "exp_dir": tmp_path, **section}), EarlyStopping)
    own_names = {"check_on_train_epoch_end": "_check_on_train_epoch_end"}
    assert {name: getattr(callback, own_names.get(name, name)) for name in params} == params


def test_each_start_may_end_after_some_epochs(tmp_path):
    """As NeMo's TopIPL has it, which makes new labels between two starts."""
    section = {**ckpt(), "exp_dir": tmp_path, "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    section["create_ipl_epoch_stopper_callback"] = True
    options = {"max_epochs": 5, "max_steps": -1, "limit_train_batches": 2, "check_val_every_n_epoch": 1}
    for steps, enable_stop in ((4, True), (8, True), (10, False)):
        params = {"enable_stop": enable_stop, "stop_every_n_epochs": 2 if enable_stop else 1}
        trainer = bare_trainer(**options, val_check_interval=1.0)
        run = exp_manager(trainer, {**section, "ipl_epoch_stopper_callback_params": params})
        model = fit(trainer)
        assert (trainer.global_step, len(model.losses)) == (steps, 4 if enable_stop else 2)
        assert [name for name in checkpoints(run) if name.endswith(f"step={steps}-last")]
    with pytest.raises(ConfigurationError, match=r"IPLEpochStopper\(stop_every_n_epochs=0\)"):
        trainer_of({**section, "ipl_epoch_stopper_callback_params": {"stop_every_n_epochs": 0}})


def test_max_time_per_run(tmp_path, caplog):
    section = {**OFF, "exp_dir": tmp_path, "max_time_per_run": "00:01:02:03"}
    callback = one_of(trainer_of(section), ours.MaxTimePerRun)
    assert callback.duration == timedelta(hours=1, minutes=2, seconds=3)
    trainer = trainer_of(section, max_time="00:00:10:00")
    assert one_of(trainer, Timer) is None
    assert "max_time_per_run replaces the trainer's Timer" in caplog.text


def test_max_time_per_run_saves_and_the_next_run_goes_on(tmp_path):
    keys = {"exp_dir": tmp_path, "resume_if_exists": True, "resume_ignore_no_checkpoint": True}
    trainer = bare_trainer(max_steps=6, val_check_interval=5)
    section = {**ckpt(every_n_train_steps=5, every_n_epochs=0), **keys, "max_time_per_run": "00:01:00:00"}
    run = exp_manager(trainer, section)

    class Slow(Scored):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                one_of(self.trainer, ours.MaxTimePerRun)._end = 0.0
            return super().training_step(batch, batch_idx)

    fit(trainer, Slow(scores=[1.0]))
    assert trainer.global_step == 3
    assert any(name.endswith("step=3-last") for name in checkpoints(run))
    trainer = bare_trainer(max_steps=6, val_check_interval=5)
    exp_manager(trainer, {**section, "max_time_per_run": None})
    model = fit(trainer, Scored(scores=[1.0]))
    assert min(model.losses) == 3


def test_preemption_saves_only_with_a_checkpoint_callback(tmp_path, caplog):
    trainer = trainer_of({**NO_CKPT, "exp_dir": tmp_path, "create_preemption_callback": True})
    assert one_of(trainer, "PreemptionCallback") is None
    assert "create_preemption_callback has no effect with create_checkpoint_callback=False" in caplog.text


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_signal_saves_if_the_section_says_so(tmp_path, wanted):
    section = {**ckpt(), "exp_dir": tmp_path, "create_preemption_callback": wanted}
    trainer = bare_trainer(callbacks=[Watch("batch", 2)])
    run = exp_manager(trainer, section)
    with pytest.raises(SystemExit) as stopped:
        fit(trainer)
    assert (stopped.value.code, trainer.global_step) == (143, 3)
    assert len(checkpoints(run)) == bool(wanted)
    assert sum(isinstance(callback, ours.PreemptionCallback) for callback in callbacks(trainer)) == 1


def test_straggler_detection(tmp_path):
    params = {
        "report_time_interval": 9.0, "calc_relative_gpu_perf": True, "calc_individual_gpu_perf": False,
        "num_gpu_perf_scores_to_log": 2, "gpu_relative_perf_threshold": 0.5, "gpu_individual_perf_threshold": 0.4,
        "stop_if_detected": True,
    }  # fmt: skip
    section = {"create_straggler_detection_callback": True, "straggler_detection_params": params}
    callback = one_of(trainer_of({**OFF, "exp_dir": tmp_path, **section}), ours.StragglerDetection)
    assert {name: getattr(callback, name) for name in params} == params


def test_fault_tolerance(tmp_path, caplog):
    params = {
        "initial_rank_heartbeat_timeout": 600.0, "rank_heartbeat_timeout": 300.0, "calculate_timeouts": False,
        "safety_factor": 2.0, "rank_termination_signal": "SIGTERM", "workload_check_interval": 1.0,
        "max_subsequent_job_failures": 2, "simulated_fault": {"fault_type": "rank_killed"},
    }  # fmt: skip
    others = {"log_level": "DEBUG", "max_rank_restarts": 3, "additional_ft_launcher_args": "--x"}
    section = {"create_fault_tolerance_callback": True, "fault_tolerance": {**params, **others}}
    callback = one_of(trainer_of({**OFF, "exp_dir": tmp_path, **section}), ours.FaultTolerance)
    assert {name: getattr(callback, name) for name in params} == {**params, "rank_termination_signal": signal.SIGTERM}
    assert callback.log_level == logging.DEBUG
    for name in ("max_rank_restarts", "additional_ft_launcher_args"):  # they are the launcher's
        assert name in caplog.text


# --- clean_exp_ckpt ---------------------------------------------------------------------------------------------------


def finished_run(tmp_path: Path) -> Path:
    trainer = bare_trainer()
    run = exp_manager(trainer, {**ckpt(every_n_train_steps=5, every_n_epochs=0), "exp_dir": tmp_path, "version": "v"})
    fit(trainer)
    for name in ("old--last.ckpt", "model.nemo", "notes.txt"):
        (run / "checkpoints" / name).write_bytes(b"x")
    (run / "checkpoints" / "old-unfinished").write_bytes(b"")
    torch.save({}, run / "other.ckpt")
    return run


def test_clean_removes_checkpoints_and_nothing_else(tmp_path):
    run = finished_run(tmp_path)
    assert len(checkpoints(run)) == 7
    clean_exp_ckpt(run)
    assert checkpoints(run) == ["model.nemo", "notes.txt"]
    assert (run / "other.ckpt").is_file()
    assert (run / "cmd-args.log").is_file()


def test_clean_removes_nemo_files_on_request(tmp_path):
    run = finished_run(tmp_path)
    before = checkpoints(run)
    clean_exp_ckpt(str(run), remove_ckpt=False, remove_nemo=True)
    assert checkpoints(run) == [name for name in before if name != "model.nemo"]
    clean_exp_ckpt(run, remove_ckpt=True, remove_nemo=True)
    assert checkpoints(run) == ["notes.txt"]
    clean_exp_ckpt(run)  # there is nothing left
    clean_exp_ckpt(tmp_path / "gone")


def test_clean_removes_nothing_where_there_is_no_run():
    clean_exp_ckpt(exp_manager(bare_trainer(fast_dev_run=True), {"name": "n"}))
    clean_exp_ckpt(None, remove_nemo=True)


def test_clean_is_rank_0s(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.ckpt").write_bytes(b"x")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as the strategy of a trainer does on that rank
    clean_exp_ckpt(tmp_path)
    assert checkpoints(tmp_path) == ["a.ckpt"]
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    clean_exp_ckpt(tmp_path)
    assert checkpoints(tmp_path) == []
