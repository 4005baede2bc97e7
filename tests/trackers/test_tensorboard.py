from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from nemologger.logger import NeMoLogger
from nemologger.run.directory import RunDirectory
from nemologger.trackers import tensorboard

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 4  # per epoch


class Tiny(pl.LightningModule):
    def __init__(self, optimizers: int = 1, own_steps: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).mean()
        self.log("loss", loss)
        if self.hparams.own_steps:
            self.log("step", float(1000 * (self.trainer.fit_loop.total_batch_idx + 1)))
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.layer(batch[0]).mean())

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(self.hparams.optimizers)]


class Stop(Callback):
    """Stands for the power that fails after so many batches: nothing is saved any more."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            raise InterruptedError


def live(
    directory: Path, model: pl.LightningModule, *, stop: int = 0, ckpt: str | None = None, **kwargs
) -> RunDirectory:
    checkpoint = kwargs.pop("checkpoint", {"every_n_train_steps": 5})
    if any(directory.iterdir()):
        time.sleep(1)  # files of one process and one second are read in the order of their names: .10 before .9
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Stop(stop)] if stop else [],
        **kwargs,
    )
    log = NeMoLogger(
        log_dir=directory,
        use_datetime_version=False,
        tensorboard=TensorBoardLogger("tb", name="curves"),
        ckpt=ModelCheckpoint(filename="{step}", save_top_k=-1, **checkpoint),
    )
    run = log.setup(trainer, resume_if_exists=True)
    data = DataLoader(TensorDataset(torch.ones(2 * BATCHES, 2)), batch_size=2)
    path = None if ckpt is None else str(run.checkpoint_dir / ckpt)
    if stop:
        with pytest.raises(InterruptedError):
            trainer.fit(model, data, data, ckpt_path=path)
    else:
        trainer.fit(model, data, data, ckpt_path=path)
    return run


def curves(run: RunDirectory) -> dict[str, list[int]]:
    events = EventAccumulator(str(run.exp_dir / "tb" / "curves"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def last_of_each_epoch() -> list[int]:
    return [BATCHES * (epoch + 1) - 1 for epoch in range(4)]


@pytest.mark.parametrize(
    ("settings", "stop", "ckpt"),
    [
        ({}, 8, "step=5.ckpt"),  # in mid-epoch
        ({"checkpoint": {"every_n_train_steps": 4}}, 7, "step=4.ckpt"),  # after an epoch's last batch
        ({"checkpoint": {"save_on_train_epoch_end": True}}, 11, "step=8.ckpt"),  # at an epoch's end
        ({"checkpoint": {"save_on_train_epoch_end": False}}, 11, "step=8.ckpt"),  # after validation
    ],
)
def test_a_resumed_run_has_every_step_once(tmp_path, settings, stop, ckpt):
    live(tmp_path, Tiny(), stop=stop, **settings)
    run = live(tmp_path, Tiny(), ckpt=ckpt, **settings)
    seen = curves(run)
    assert seen["loss"] == list(range(4 * BATCHES))
    assert seen["val_loss"] == last_of_each_epoch()
    assert seen["hp_metric"] == [0]


def test_accumulated_gradients_and_validation_in_between(tmp_path):
    settings = {
        "accumulate_grad_batches": 2,
        "val_check_interval": 2,
        "checkpoint": {"save_on_train_epoch_end": False},
    }
    live(tmp_path, Tiny(), stop=7, **settings)
    seen = curves(live(tmp_path, Tiny(), ckpt="step=3.ckpt", **settings))
    assert seen["loss"] == list(range(8))
    assert seen["val_loss"] == list(range(8))


def test_several_optimizers_count_as_one_step(tmp_path):
    settings = {"checkpoint": {"every_n_train_steps": 10}}
    live(tmp_path, Tiny(optimizers=2), stop=8, **settings)
    seen = curves(live(tmp_path, Tiny(optimizers=2), ckpt="step=10.ckpt", **settings))
    assert seen["loss"] == list(range(4 * BATCHES))


def test_a_run_that_died_before_its_first_checkpoint_starts_its_curves_again(tmp_path):
    live(tmp_path, Tiny(), stop=3)
    seen = curves(live(tmp_path, Tiny()))
    assert seen["loss"] == list(range(4 * BATCHES))


def test_a_run_that_is_killed_many_times(tmp_path):
    live(tmp_path, Tiny(), stop=6, checkpoint={"every_n_train_steps": 1})
    for start, stop in ((3, 6), (5, 7), (6, 9)):
        live(tmp_path, Tiny(), stop=stop, ckpt=f"step={start}.ckpt", checkpoint={"every_n_train_steps": 1})
    seen = curves(live(tmp_path, Tiny(), ckpt="step=7.ckpt"))
    assert seen["loss"] == list(range(4 * BATCHES))


@pytest.mark.parametrize("ahead", [0, 3600])
def test_an_earlier_life_whose_clock_was_ahead_is_named(tmp_path, caplog, ahead):
    earlier = live(tmp_path, Tiny(), stop=8)
    (file,) = (earlier.exp_dir / "tb" / "curves").glob("events*")
    seconds = file.name.split(".")[3]
    file = file.rename(file.with_name(file.name.replace(seconds, str(int(seconds) + ahead))))
    live(tmp_path, Tiny(), ckpt="step=5.ckpt")
    told = [record.getMessage() for record in caplog.records if "clock" in record.getMessage()]
    assert len(told) == bool(ahead)
    assert not ahead or file.name in told[0]


def test_steps_that_the_model_counts_itself_are_not_voided(tmp_path):
    live(tmp_path, Tiny(own_steps=True), stop=8)
    seen = curves(live(tmp_path, Tiny(own_steps=True), ckpt="step=5000.ckpt"))
    assert set(seen["loss"]) == {1000 * (batch + 1) for batch in range(4 * BATCHES)}


def test_a_run_that_is_not_resumed_is_left_alone(tmp_path):
    run = live(tmp_path, Tiny())
    assert curves(run)["loss"] == list(range(4 * BATCHES))
    sessions: dict[str, int] = defaultdict(int)
    for file in (run.exp_dir / "tb" / "curves").glob("events*"):
        sessions[file.name] += file.read_bytes().count(b"session")
    assert len(sessions) == 1


@pytest.mark.parametrize(
    ("version", "save_dir", "where"),
    [("v1", "tb", "tb/curves/v1"), (None, "tb", "tb/curves"), ("v1", ".", "curves/v1")],
)
def test_it_writes_below_the_experiments_directory_under_the_version(tmp_path, version, save_dir, where):
    run = RunDirectory(tmp_path / "base", tmp_path / "base" / "name", "name", version)
    logger = TensorBoardLogger(save_dir, name="curves", sub_dir="sub", prefix="p", max_queue=7)
    tensorboard.move(logger, run, [Path.cwd()], is_default=False)
    assert Path(logger.log_dir) == tmp_path / "base" / where / "sub"
    logger.log_metrics({"x": 1.0}, 0)
    assert logger.experiment.max_queue == 7
    logger.finalize("success")
    assert [*(tmp_path / "base" / where / "sub").glob("events*")]


def test_the_default_logger_writes_to_the_run_directory(tmp_path):
    run = RunDirectory(tmp_path / "base", tmp_path / "base" / "name" / "v1", "name", "v1")
    logger = TensorBoardLogger(tmp_path)
    tensorboard.move(logger, run, [tmp_path], is_default=True)
    assert Path(logger.log_dir) == run.log_dir
