"""What each field of ``checkpoint_callback_params`` changes on disk."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.sections import NO_CKPT, OFF, bare_trainer, checkpoints, ckpt, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toy import Scored, ToyModel, manifests

from nemologger import ModelCheckpoint, load_weights
from nemologger.checkpoint.manifest import read
from nemologger.errors import ConfigurationError
from nemologger.exp_manager import exp_manager

SCORES = [3.0, 1.0, 2.0, 5.0, 4.0]


def run(tmp_path: Path, steps: int = 5, model: ToyModel | None = None, options=None, **params):
    """The run directory after training that validates after every step."""
    trainer = bare_trainer(**{"max_steps": steps, "val_check_interval": 1, **(options or {})})
    log_dir = exp_manager(trainer, {**ckpt(**params), "exp_dir": tmp_path, "version": "v"})
    fit(trainer, model or Scored(scores=SCORES, metric=params.get("monitor", "val_loss")))
    return log_dir


def steps_in(log_dir: Path, *, last: bool = False) -> list[int]:
    found = manifests(log_dir / "checkpoints").values()
    return sorted(manifest.step for manifest in found if manifest.last is last)


EVERY_STEP = {"every_n_train_steps": 1}


def test_save_top_k_monitor_and_mode(tmp_path):
    log_dir = run(tmp_path, **EVERY_STEP)
    assert steps_in(log_dir) == [1, 2, 3]
    assert checkpoints(log_dir)[0] == "default--val_loss=1.0000-epoch=0-step=2"
    assert steps_in(run(tmp_path / "1", save_top_k=1, **EVERY_STEP)) == [2]
    assert steps_in(run(tmp_path / "max", save_top_k=2, mode="max", **EVERY_STEP)) == [4, 5]
    assert steps_in(run(tmp_path / "all", save_top_k=-1, **EVERY_STEP)) == [1, 2, 3, 4, 5]
    log_dir = run(tmp_path / "wer", save_top_k=1, monitor="val_wer", **EVERY_STEP)
    assert "default--val_wer=1.0000-epoch=0-step=2" in checkpoints(log_dir)


def test_save_last(tmp_path):
    assert steps_in(run(tmp_path / "on", **EVERY_STEP), last=True) == [5]
    assert steps_in(run(tmp_path / "off", save_last=False, **EVERY_STEP), last=True) == []


def test_verbose(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "off", verbose=False, **EVERY_STEP)
    assert "step 2: saved" not in caplog.text
    run(tmp_path / "on", **EVERY_STEP)
    assert "step 2: saved" in caplog.text


def test_save_weights_only(tmp_path):
    for weights_only in (False, True):
        log_dir = run(tmp_path / str(weights_only), save_weights_only=weights_only, **EVERY_STEP)
        assert {m.has_optimizer for m in manifests(log_dir / "checkpoints").values()} == {not weights_only}


def test_dirpath(tmp_path):
    log_dir = run(tmp_path, dirpath=str(tmp_path / "there"), **EVERY_STEP)
    assert not (log_dir / "checkpoints").exists()
    assert len(list((tmp_path / "there").iterdir())) == 4


def test_filename_and_auto_insert_metric_name(tmp_path):
    log_dir = run(tmp_path / "1", filename="my-{val_loss:.1f}-{step}", **EVERY_STEP)
    assert "my-val_loss=1.0-step=2" in checkpoints(log_dir)
    log_dir = run(tmp_path / "2", filename="my-{val_loss:.1f}-{step}", auto_insert_metric_name=False, **EVERY_STEP)
    assert "my-1.0-2" in checkpoints(log_dir)


def test_filepath_is_dirpath_and_filename(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path, filepath=str(tmp_path / "old" / "my-{step}"), **EVERY_STEP)
    assert (tmp_path / "old" / "my-step=2").is_dir()
    assert "filepath is deprecated" in caplog.text
    run(tmp_path, filepath=str(tmp_path / "old" / "my-{step}"), dirpath=str(tmp_path / "new"), **EVERY_STEP)
    assert (tmp_path / "new" / "my-step=2").is_dir()


def test_when_it_saves(tmp_path):
    """The intervals of NeMo 1's defaults: each epoch, unless another one is asked for."""
    epochs = {"max_epochs": 4, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}

    def saved(name: str, **params):
        trainer = bare_trainer(**{**epochs, "max_steps": -1})
        log_dir = exp_manager(trainer, {**ckpt(save_top_k=-1, save_last=False, **params), "exp_dir": tmp_path / name})
        fit(trainer)
        return steps_in(log_dir)

    assert saved("default") == [10, 20, 30, 40]
    assert saved("epochs", every_n_epochs=2) == [20, 40]
    assert saved("steps", every_n_train_steps=16) == [16, 32, 40]
    assert saved("steps, as people write it", every_n_train_steps=16, every_n_epochs=0) == [16, 32, 40]
    with pytest.raises(MisconfigurationException, match="mutually exclusive"):
        saved("both", every_n_train_steps=16, every_n_epochs=1)


def test_save_on_train_epoch_end(tmp_path):
    """Of two epochs the second is validated: with it, or with the training of each epoch, comes a checkpoint."""
    steps = {}
    for at_train_end in (False, True):
        trainer = bare_trainer(max_epochs=2, max_steps=-1, check_val_every_n_epoch=2, val_check_interval=1.0)
        params = {"save_on_train_epoch_end": at_train_end, "monitor": "train_loss"}
        log_dir = exp_manager(trainer, {**ckpt(**params), "exp_dir": tmp_path / str(at_train_end)})
        fit(trainer)
        steps[at_train_end] = steps_in(log_dir)
    assert steps == {False: [20], True: [10, 20]}


@pytest.mark.parametrize(
    "interval",
    [
        timedelta(milliseconds=1),
        {"_target_": "datetime.timedelta", "milliseconds": 1},
        {"milliseconds": 1},
        "00:00:00:00",
    ],
)
def test_train_time_interval(tmp_path, interval):
    assert steps_in(run(tmp_path, train_time_interval=interval, save_top_k=-1)) == [1, 2, 3, 4, 5]
    log_dir = run(tmp_path / "long", train_time_interval="01:00:00:00", save_top_k=-1)
    assert steps_in(log_dir, last=True) == [5]


@pytest.mark.parametrize("interval", [3, "soon", {"fortnights": 1}, {"_target_": "os.system", "command": "ls"}])
def test_a_train_time_interval_that_is_none(tmp_path, interval):
    with pytest.raises(ConfigurationError, match=r"checkpoint_callback_params\.train_time_interval="):
        run(tmp_path, train_time_interval=interval)


def test_async_save(tmp_path):
    """The writer is another process: its saves are published some steps later, and the final one before fit returns."""
    trainer = bare_trainer(max_steps=5, val_check_interval=1)
    log_dir = exp_manager(trainer, {**ckpt(async_save=True, **EVERY_STEP), "exp_dir": tmp_path, "version": "v"})
    callback = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    busy = []
    save = callback._save
    callback._save = lambda *a, **k: (save(*a, **k), busy.append(callback._keeper.busy))
    fit(trainer, Scored(scores=SCORES))
    assert any(busy)
    assert steps_in(log_dir) == [1, 2, 3]


def test_model_parallel_size_has_no_effect(tmp_path, caplog):
    run(tmp_path, model_parallel_size=2, **EVERY_STEP)
    assert "checkpoint_callback_params.model_parallel_size has no effect: the trainer's strategy" in caplog.text


def test_save_last_n_optim_states(tmp_path):
    """Which of the best three, of steps 1 to 3, have optimizer state; the files of the others are there no more."""
    for value, expected in ((None, [1, 2, 3]), (2, [2, 3]), (0, [])):
        directory = run(tmp_path / str(value), save_last_n_optim_states=value, **EVERY_STEP) / "checkpoints"
        found = {name: m for name, m in manifests(directory).items() if not m.last}
        assert sorted(m.step for m in found.values() if m.has_optimizer) == expected
        for name, manifest in found.items():
            files = list((directory / name / "weights").glob("*.distcp"))
            assert len(files) == (2 if manifest.has_optimizer else 1)
    assert all(m.has_optimizer for m in manifests(directory).values() if m.last)
    with pytest.raises(ConfigurationError, match=r"save_last_n_optim_states=-2"):
        run(tmp_path / "wrong", save_last_n_optim_states=-2, **EVERY_STEP)


def test_no_checkpoint_callback(tmp_path, caplog):
    trainer = bare_trainer(max_steps=2)
    section = {**NO_CKPT, "exp_dir": tmp_path, "version": "v", "checkpoint_callback_params": {"save_top_k": 9}}
    log_dir = exp_manager(trainer, section)
    fit(trainer)
    assert trainer.checkpoint_callbacks == []
    assert not (log_dir / "checkpoints").exists()
    assert "checkpoint_callback_params has no effect: create_checkpoint_callback is off" in caplog.text


def test_a_monitor_that_never_appears_is_found_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="can never appear"):
        run(tmp_path, options={"val_check_interval": 100})


# --- .nemo and other files --------------------------------------------------------------------------------------------


class NeMoModel(Scored):
    """Has what NeMo's models have."""

    saves: tuple[str, ...] = ()

    def save_to(self, save_path: str) -> None:
        self.saves = (*self.saves, save_path)
        torch.save({key: value.clone() for key, value in self.state_dict().items()}, save_path)


def weights_at(log_dir: Path, step: int) -> dict[str, torch.Tensor]:
    model = NeMoModel()
    path = next(path for path in (log_dir / "checkpoints").glob(f"*-step={step}") if read(path).step == step)
    load_weights(path, model)
    return model.state_dict()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train_and_export(tmp_path: Path, name: str | None = None, **params):
    trainer = bare_trainer(max_steps=5, val_check_interval=1)
    callback_params = {"save_top_k": -1, **EVERY_STEP, **params}
    section = {**OFF, "checkpoint_callback_params": callback_params, "exp_dir": tmp_path, "version": "v", "name": name}
    log_dir = exp_manager(trainer, section)
    model = NeMoModel(scores=SCORES)
    fit(trainer, model)
    return log_dir, model


def test_a_model_that_can_is_asked_for_its_nemo_file(tmp_path):
    log_dir, model = train_and_export(tmp_path, name="quartz")
    file = log_dir / "checkpoints" / "quartz.nemo"
    assert model.saves == (str(file),)
    assert same(torch.load(file), model.state_dict())


def test_save_best_model(tmp_path):
    log_dir, model = train_and_export(tmp_path, save_best_model=True)
    saved = torch.load(log_dir / "checkpoints" / "default.nemo")
    assert same(saved, weights_at(log_dir, 2))  # the lowest score
    assert not same(saved, model.state_dict())
    assert same(model.state_dict(), weights_at(log_dir, 5))


def test_always_save_nemo(tmp_path):
    log_dir, model = train_and_export(tmp_path, always_save_nemo=True)
    assert len(model.saves) == 5
    assert same(torch.load(log_dir / "checkpoints" / "default.nemo"), weights_at(log_dir, 5))
    log_dir, model = train_and_export(tmp_path / "best", always_save_nemo=True, save_best_model=True)
    assert len(model.saves) == 2  # after the steps 1 and 2, which were the best so far


def test_save_nemo_on_train_end_off(tmp_path, caplog):
    log_dir, model = train_and_export(tmp_path, save_nemo_on_train_end=False)
    assert model.saves == ()
    assert not list((log_dir / "checkpoints").glob("*.nemo"))
    train_and_export(tmp_path / "best", save_nemo_on_train_end=False, save_best_model=True, prefix="x")
    assert "save_best_model has no effect with save_nemo_on_train_end=False" in caplog.text
    train_and_export(tmp_path / "prefix", save_nemo_on_train_end=False, prefix="x")
    assert "prefix has no effect with save_nemo_on_train_end=False" in caplog.text


def test_prefix_and_postfix(tmp_path):
    log_dir, _ = train_and_export(tmp_path / "1", prefix="mine", postfix="-v2.nemo")
    assert (log_dir / "checkpoints" / "mine-v2.nemo").is_file()


@pytest.mark.parametrize("postfix", [".pt", ".safetensors"])
def test_other_files_hold_the_weights_of_any_model(tmp_path, postfix):
    trainer = bare_trainer(max_steps=5, val_check_interval=1)
    params = {"postfix": postfix, "save_best_model": True, "save_top_k": -1, **EVERY_STEP}
    log_dir = exp_manager(trainer, {**OFF, "checkpoint_callback_params": params, "exp_dir": tmp_path, "version": "v"})
    fit(trainer, Scored(scores=SCORES))
    file = log_dir / "checkpoints" / f"default{postfix}"
    if postfix == ".pt":
        exported = torch.load(file, weights_only=True)
    else:
        from safetensors.torch import load_file

        exported = load_file(file)
    assert same(exported, weights_at(log_dir, 2))


def test_a_model_that_cannot_is_told_so(tmp_path, caplog):
    trainer = bare_trainer(max_steps=5, val_check_interval=1)
    log_dir = exp_manager(trainer, {**OFF, "exp_dir": tmp_path, "version": "v"})
    fit(trainer, Scored(scores=SCORES))
    assert "no default.nemo is going to be written: Scored has no method save_to()" in caplog.text
    assert not list((log_dir / "checkpoints").glob("default.*"))
