"""The context of a run."""

from __future__ import annotations

import logging
import warnings

import ctxmod
import fiddle as fdl
import lightning.pytorch as pl
import pytest
import torch
import yaml
from fiddle.experimental import serialization
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel

from nemologger.errors import ContextError
from nemologger.io import TrainerContext, Uncaptured, load_context, track_io
from nemologger.trainer import Trainer

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Dumps(pl.Callback):
    """Writes the context in the middle of training, as a checkpoint does."""

    def __init__(self, directory, strict=True):
        self.directory, self.strict = directory, strict

    def on_train_batch_end(self, trainer, *args):
        TrainerContext.from_trainer(trainer).io_dump(self.directory, strict=self.strict)


class Learner(ctxmod.Model):
    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbers(ctxmod.Data):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 1), batch_size=2)


@pytest.fixture(autouse=True)
def findable(monkeypatch):
    for cls in (Learner, Numbers, Dumps):
        monkeypatch.setattr(cls, "__module__", "ctxmod")
        monkeypatch.setattr(ctxmod, cls.__name__, cls, raising=False)


@pytest.mark.usefixtures("quiet_loaders")
def test_the_context_of_a_run_holds_model_trainer_and_data(tmp_path):
    trainer = Trainer(max_steps=2, callbacks=[], limit_val_batches=0.5, **QUIET)
    trainer.callbacks.append(Dumps(tmp_path))
    trainer.fit(Learner(ctxmod.Cfg(dim=3)), datamodule=Numbers(seq_length=7))

    context = load_context(tmp_path)
    assert isinstance(context, TrainerContext)
    assert context.model.config == ctxmod.Cfg(dim=3)
    assert context.extra["datamodule"].seq_length == 7
    assert isinstance(context.trainer, Trainer)
    assert context.trainer.limit_val_batches == 0.5
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["config"]["dim"] == 3
    config = serialization.load_json((tmp_path / "io.json").read_text())
    assert fdl.get_callable(config) is TrainerContext
    assert '"module": "nemologger.io", "name": "TrainerContext"' in (tmp_path / "io.json").read_text()


@pytest.mark.usefixtures("quiet_loaders")
def test_a_plain_trainer_is_named_once_and_the_rest_is_kept(tmp_path):
    trainer = pl.Trainer(max_steps=2, callbacks=[Dumps(tmp_path)], **QUIET)
    with pytest.warns(UserWarning, match=r"trainer \(lightning.*Trainer\): .*use nemologger.Trainer") as caught:
        trainer.fit(Learner(ctxmod.Cfg(dim=3)), datamodule=Numbers())
    said = [w for w in caught if "nemologger.Trainer" in str(w.message)]
    assert [w.filename for w in said] == [__file__], "it points at the line of the user, not at ours"

    context = load_context(tmp_path)
    assert context.model.config.dim == 3
    assert isinstance(context.trainer, Uncaptured)
    assert load_context(tmp_path, "model").config.dim == 3
    with pytest.raises(ContextError, match=r"trainer was not kept: .*Trainer: Lightning's Trainer does not keep"):
        load_context(tmp_path, "trainer")


class Bare(pl.LightningDataModule):
    """Without a constructor of its own, it has Lightning's, which takes anything and does nothing with it."""


class BareModel(pl.LightningModule):
    """Likewise."""


def test_what_is_made_without_arguments_needs_no_capture(tmp_path):
    context = TrainerContext(BareModel(), Trainer(max_steps=3, **QUIET), {"datamodule": Bare()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context.io_dump(tmp_path)
        again = load_context(tmp_path)
    assert isinstance(again.extra["datamodule"], Bare)
    assert isinstance(again.model, BareModel)


def test_what_the_run_was_given_without_capture_is_named_and_the_rest_is_kept(tmp_path):
    trainer = Trainer(callbacks=[EarlyStopping("val_loss")], max_steps=3, **QUIET)
    context = TrainerContext(
        ctxmod.Forgetful(1), trainer, {"datamodule": ctxmod.HparamsModel(4), "rest": ctxmod.Plain()}
    )
    with pytest.warns(UserWarning, match="does not hold everything that was passed") as caught:
        context.io_dump(tmp_path)
    said = str(caught[0].message)
    for entry in (
        "model (ctxmod.Forgetful)",
        "trainer.callbacks[0] (lightning.pytorch.callbacks.early_stopping.EarlyStopping)",
        "extra.rest (ctxmod.Plain)",
    ):
        assert entry in said

    with pytest.warns(UserWarning, match=r"left out:\n  - trainer.callbacks\[0\]"):
        again = load_context(tmp_path)
    assert again.model.what == "ctxmod.Forgetful"
    assert again.trainer.max_steps == 3
    assert again.extra["datamodule"].hparams.width == 4
    assert isinstance(again.extra["rest"], Uncaptured)


def test_beside_a_checkpoint_one_line_of_the_log_names_what_only_describes_the_run(tmp_path, caplog):
    trainer = Trainer(callbacks=[EarlyStopping("val_loss")], max_steps=3, **QUIET)
    context = TrainerContext(BareModel(), trainer, {"datamodule": ctxmod.Plain()})
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        for name in ("first", "second"):
            context.io_dump(tmp_path / name, strict=False)
    (line,) = [record.message for record in caplog.records if "leaves out" in record.message]
    assert "first leaves out trainer.callbacks[0] (lightning.pytorch.callbacks.early_stopping.EarlyStopping), " in line
    assert "extra.datamodule (ctxmod.Plain); " in line
    assert "\n" not in line
    with pytest.warns(UserWarning, match=r"model \(ctxmod.Forgetful\)"):  # without which there is no load_model
        TrainerContext(ctxmod.Forgetful(1), trainer).io_dump(tmp_path / "third", strict=False)


def test_callbacks_that_are_captured_come_back(tmp_path):
    class Counter(pl.Callback):
        def __init__(self, every):
            self.every = every

    Counter.__module__, Counter.__qualname__ = "ctxmod", "Counter"
    ctxmod.Counter = track_io(Counter)
    try:
        trainer = Trainer(callbacks=[Counter(5)], **QUIET)
        TrainerContext(BoringModel(), trainer).io_dump(tmp_path)
        callbacks = load_context(tmp_path).trainer.callbacks
    finally:
        del ctxmod.Counter
    assert [c.every for c in callbacks if isinstance(c, Counter)] == [5]


def test_the_trainers_callbacks_are_kept_as_they_were_passed():
    callbacks: list = []
    trainer = Trainer(callbacks=callbacks, **QUIET)
    callbacks.append(EarlyStopping("val_loss"))
    assert trainer.__io__.callbacks == []


def test_a_trainer_without_a_module_has_no_context():
    with pytest.raises(ContextError, match="has no module yet"):
        TrainerContext.from_trainer(Trainer(**QUIET))


@pytest.mark.usefixtures("quiet_loaders")
def test_a_missing_artifact_does_not_cost_the_context_when_the_caller_says_so(tmp_path):
    model = Learner(ctxmod.Cfg(dim=3), tokenizer=ctxmod.Tok(str(tmp_path / "gone")))
    with pytest.raises(ContextError, match=r"model\.tokenizer\.vocab_file: there is no file"):
        Trainer(max_steps=1, callbacks=[Dumps(tmp_path / "c")], **QUIET).fit(model, datamodule=Numbers())
    assert not (tmp_path / "c").exists()
    with pytest.warns(UserWarning, match=r"model\.tokenizer\.vocab_file: there is no file"):
        Trainer(max_steps=1, callbacks=[Dumps(tmp_path / "c", strict=False)], **QUIET).fit(model, datamodule=Numbers())
    assert load_context(tmp_path / "c", "model").config.dim == 3


def test_a_model_that_is_older_than_its_class_is_named(tmp_path, monkeypatch):
    """The cell of a notebook that defines the class was run again, and the one that makes the object was not."""
    model = ctxmod.Model(ctxmod.Cfg(), ctxmod.Tok(__file__))
    monkeypatch.setattr(ctxmod, "Model", type("Model", (ctxmod.Model,), {}))
    with pytest.warns(UserWarning, match=r"another object took its name \(a cell was run again"):
        TrainerContext(model, Trainer(max_steps=3, **QUIET)).io_dump(tmp_path)


def test_a_model_whose_class_has_no_name_is_named_and_the_trainer_is_kept(tmp_path):
    class Local(pl.LightningModule, ctxmod.IOMixin):
        pass

    with pytest.warns(UserWarning, match=r"model \(.*<locals>.Local\): .* defined inside a function"):
        TrainerContext(Local(), Trainer(max_steps=3, **QUIET)).io_dump(tmp_path)
    assert load_context(tmp_path).model.what.endswith("<locals>.Local")
    assert load_context(tmp_path, "trainer").max_steps == 3
    with pytest.raises(ContextError, match=r"cannot be written: the object itself"):
        ctxmod.IOMixin.io_dump(type("Mine", (ctxmod.IOMixin,), {"__module__": "ctxmod"})(), tmp_path)
