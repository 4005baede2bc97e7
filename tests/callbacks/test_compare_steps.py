"""A run that goes on says whether what it trains again is what it was: real runs, stopped behind a checkpoint."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from threading import Event

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader

import nemologger as nl
from nemologger.callbacks import compare_steps
from nemologger.callbacks.compare_steps import FILE, CompareSteps
from nemologger.exact import trained_steps
from nemologger.exact.trained_steps import TrainedSteps

SAME, OTHER = "are the same again, to the bit", "is not what it was before the run ended"
#: Numbers that no checkpoint can know of: the state of an iterator.
HIDDEN = iter(range(10**6))


class Net(pl.LightningModule):
    def __init__(self, hidden_from: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.hidden_from = hidden_from
        self.lr = 0.01

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean()
        changed = self.hidden_from is not None and self.global_step >= self.hidden_from
        return loss * (2 + next(HIDDEN)) if changed else loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ByHand(Net):
    """Returns no loss."""

    def __init__(self, hidden_from: int | None = None) -> None:
        super().__init__(hidden_from)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class StopAt(pl.Callback):
    """Ends a run as a crash does: nothing more is saved."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def life(directory, stop_at=None, model=None, callbacks=(), steps=20, **options):
    """One life of a run that saves every five steps."""
    torch.manual_seed(1)
    ckpt = nl.ModelCheckpoint(
        monitor=None, every_n_train_steps=5, dirpath=directory, always_save_context=False, save_context_on_train_end=False
    )  # fmt: skip
    trainer = nl.Trainer(
        **{
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": [ckpt, StopAt(stop_at), *callbacks], **options,
        }
    )  # fmt: skip
    resume = nl.AutoResume(
        resume_if_exists=True, resume_ignore_no_checkpoint=True, resume_from_directory=str(directory)
    )
    data = DataLoader(torch.randn(28, 4), batch_size=2, shuffle=True)
    log = nl.NeMoLogger(name="run", log_dir=directory.parent / "log", tensorboard=None)
    with suppress(RuntimeError):
        nl.train(Net() if model is None else model, data, trainer, log, resume)
    return trainer


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger=compare_steps.__name__)

    def get():
        found = [record.getMessage() for record in caplog.records if record.name == compare_steps.__name__]
        caplog.clear()
        return found

    return get


def test_a_disk_that_does_not_answer_holds_up_no_step(tmp_path, said, monkeypatch):
    """Nothing but the end of training waits for it; what was new meanwhile is written then."""
    begun, trained, write, waited = Event(), Event(), trained_steps.write_all, []

    def hangs(*arguments):
        waited.append(not begun.is_set() or trained.wait(timeout=100))
        write(*arguments)

    class Trained(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            begun.set()
            if trainer.global_step == 8:
                trained.set()

    monkeypatch.setattr(trained_steps, "write_all", hangs)
    monkeypatch.setattr(compare_steps, "_WRITE_EVERY", 0.0)
    life(tmp_path / "c", 9, callbacks=[Trained()])
    assert len(waited) > 1
    assert all(waited)
    assert (tmp_path / "c" / FILE).read_text().count("\n") == 10
    life(tmp_path / "c", 13)
    assert said() == [f"4 steps that had been trained before the run ended, behind its checkpoint, {SAME}"]


@pytest.mark.parametrize("model", [Net, ByHand])
def test_what_repeats_is_said(model, tmp_path, said):
    life(tmp_path / "c", 9, model())
    assert (tmp_path / "c" / FILE).read_text().count("\n") == 10
    assert not said()
    life(tmp_path / "c", 7, model())  # less far than before
    assert not said()
    life(tmp_path / "c", 13, model())
    (line,) = said()
    assert line == f"4 steps that had been trained before the run ended, behind its checkpoint, {SAME}"
    life(tmp_path / "c", None, model())
    (line,) = said()
    assert line.startswith("3 steps")
    assert not (tmp_path / "c" / FILE).exists()  # nothing is left to repeat


@pytest.mark.parametrize("model", [Net, ByHand])
def test_the_first_step_that_differs_is_named_once(model, tmp_path, said):
    life(tmp_path / "c", 9, model(hidden_from=7))
    life(tmp_path / "c", 9, model(hidden_from=7))
    (line,) = said()
    assert line.startswith("step 8, trained again")
    assert OTHER in line
    assert "(2 steps before it are)" in line
    assert "'exact resume', here or in the log of an earlier start" in line
    # What is compared next is the line of training that differed, not the first one.
    life(tmp_path / "c", 8, model())
    said()
    life(tmp_path / "c", 12, model())
    (line,) = said()
    assert SAME in line


def test_steps_from_elsewhere_are_not_compared(tmp_path, said):
    life(tmp_path / "c", 9)
    file = tmp_path / "c" / FILE
    file.write_text(file.read_text().replace("1 x cpu", "8 x NVIDIA H100"))
    life(tmp_path / "c", 8)
    (line,) = said()
    assert line.startswith("4 steps behind the checkpoint had been trained on 8 x NVIDIA H100")
    assert file.read_text().startswith("1 x cpu")
    assert len(file.read_text().splitlines()) == 9


def test_a_run_from_scratch_is_compared_with_nothing(tmp_path, said):
    life(tmp_path / "c", 3)
    life(tmp_path / "c", 4, Net(hidden_from=0))
    assert not said()
    assert len((tmp_path / "c" / FILE).read_text().splitlines()) == 5


def test_lightnings_tuners_are_not_taken_for_the_run(tmp_path, said):
    life(tmp_path / "c", 4, callbacks=[LearningRateFinder(num_training_steps=10)])
    life(tmp_path / "c", 4, Net(hidden_from=0), callbacks=[LearningRateFinder(num_training_steps=10)])
    assert not said()


@pytest.mark.parametrize("exact_resume", [True, False])
def test_it_belongs_to_exact_resume(exact_resume, tmp_path):
    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert (tmp_path / FILE).exists() == exact_resume

    trainer = nl.Trainer(
        max_steps=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            nl.ModelCheckpoint(monitor=None, dirpath=tmp_path, exact_resume=exact_resume, verbose=False), Looks(),
        ],
    )  # fmt: skip
    trainer.fit(Net(), DataLoader(torch.randn(8, 4)))


def test_a_disk_that_fails_costs_the_comparison_alone(tmp_path, said):
    (tmp_path / "c" / FILE).mkdir(parents=True)
    trainer = life(tmp_path / "c")
    assert trainer.global_step == 20
    (line,) = said()
    assert "not written down" in line
    assert os.fspath(tmp_path / "c" / FILE) in line


@pytest.mark.parametrize(("then", "now", "exactly", "same"), [
    ("0.5", 0.5, True, True), ("0.5", 0.5000001, True, False), ("nan", float("nan"), True, True),
    ("0.5", 0.5000001, False, True), ("0.5", 0.52, False, False), ("x", 0.5, False, False),
])  # fmt: skip
def test_what_is_the_same(then, now, exactly, same, tmp_path):
    compare = CompareSteps(tmp_path)
    compare._exactly = exactly
    assert compare._same(then, now) == same


@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float64, torch.float32])
def test_values_of_any_types_are_read(other, tmp_path):
    """A loss is missing in some steps of a GPU, and the parameter that stands for it has a type of its own."""
    compare = CompareSteps(tmp_path)
    compare._steps = TrainedSteps(tmp_path / FILE, "1 x cuda")
    compare._new.extend([(1, torch.tensor(1.0)), (2, torch.tensor(1.5).to(other)), (3, torch.tensor(1.75).to(other))])
    compare._look()
    compare._wait()
    assert compare._steps.behind(0) == {1: "1.0", 2: "1.5", 3: "1.75"}
    compare._new.extend([(4, torch.tensor(2.0).to(other)), (5, torch.tensor(2.5).to(other))])
    compare._look()
    compare._wait()
    assert compare._steps.behind(3) == {4: "2.0", 5: "2.5"}
    compare.close()
