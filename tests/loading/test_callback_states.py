"""What becomes of callbacks' states that a checkpoint holds."""

from __future__ import annotations

import warnings

import pytest
from lightning.pytorch.callbacks import Callback
from toy import ToyModel, loader, quiet_trainer

from nemologger import AutoResume, ModelCheckpoint
from nemologger.callbacks import EMA
from nemologger.callbacks.exact_resume import ExactResume
from nemologger.loading.callback_states import settle


def _saves(directory, steps=5):
    return ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=steps)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    trainer = quiet_trainer(max_steps=5, callbacks=[_saves(directory), EMA(decay=0.5)])
    trainer.fit(ToyModel(), loader(), loader())
    return directory / "step=5"


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_only_what_such_a_task_uses_is_asked_for(checkpoint, task, monkeypatch):
    monkeypatch.setattr(ToyModel, "test_step", ToyModel.validation_step, raising=False)
    monkeypatch.setattr(ToyModel, "predict_step", lambda self, batch, i: self.net(batch), raising=False)
    trainer = quiet_trainer()
    AutoResume().setup(trainer)
    with pytest.warns(UserWarning, match=r"add the following callbacks: \['EMA'\]"):
        getattr(trainer, task)(ToyModel(), loader(), ckpt_path=str(checkpoint))


def test_a_fit_with_another_interval_asks_for_nothing_and_goes_on_counting(checkpoint):
    saves, model = _saves(checkpoint.parent, steps=4), ToyModel()
    trainer = quiet_trainer(max_steps=7, callbacks=[saves, EMA(decay=0.5)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Be aware that when using `ckpt_path`")
        trainer.fit(model, loader(), loader(), ckpt_path=str(checkpoint))
    assert sorted(model.losses) == [5, 6]
    assert saves.consumed_samples == 7 * 4


def test_with_several_that_save_each_state_keeps_its_name(tmp_path):
    ours = {"dirpath": "x", "consumed_samples": 1}
    states = {"a": ours, "b": ours, ExactResume().state_key: {}, "other": {}}
    trainer = quiet_trainer(callbacks=[_saves(tmp_path)])
    assert settle(trainer, states, is_fit=True) == states
    assert settle(trainer, states, is_fit=False) == {"other": {}}


def test_a_callback_of_the_user_that_counts_samples_keeps_its_own():
    class Counts(Callback):
        consumed_samples = 3

    states = {"a": {"dirpath": "x", "consumed_samples": 1}, "Counts": {"n": 3}}
    assert settle(quiet_trainer(callbacks=[Counts()]), states, is_fit=True) == states
