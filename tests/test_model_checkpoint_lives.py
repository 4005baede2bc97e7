"""ModelCheckpoint from one fit to the next: the same object again, the same directory from scratch, a step back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.saved_run import StopAt, StoppedError, run
from lightning.pytorch.callbacks import Callback
from toy import Scored, ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ModelCheckpoint, load_weights
from nemologger.disk import LocalDisk


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model."""
    model = ToyModel()
    load_weights(directory, model)
    return model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- one object, several fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["sync", "async"])
def test_one_object_saves_the_runs_of_several_trainers(tmp_path, beside):
    """A cell of a notebook that is run twice: what is on disk then is of the second run."""
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, async_save=beside
    )
    trained = []
    for seed in range(2):
        model = ToyModel()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.net[0].weight)
        quiet_trainer(max_steps=4, callbacks=[ckpt]).fit(model, loader())
        trained.append(model.state_dict())
    assert not same(*trained)
    assert names(tmp_path) == ["step=4", "step=4-last"]
    assert same(weights(tmp_path / "step=4"), trained[1])
    assert same(weights(tmp_path / "step=4-last"), trained[1])
    assert {m.consumed_samples for m in manifests(tmp_path).values()} == {16}


def test_a_fresh_run_knows_nothing_of_the_one_that_the_object_has_resumed_before(tmp_path):
    first, _ = run(tmp_path / "first", 10, every_n_train_steps=2)
    ckpt = ModelCheckpoint(dirpath=tmp_path / "second", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    resumed = quiet_trainer(max_steps=11, callbacks=[ckpt])
    resumed.fit(ToyModel(), loader(), loader(), ckpt_path=first.last_model_path)
    assert ckpt.consumed_samples == 44
    shutil.rmtree(tmp_path / "second")
    quiet_trainer(max_steps=6, val_check_interval=5, callbacks=[ckpt]).fit(ToyModel(), loader(), loader())
    saved = {m.step: m for m in manifests(tmp_path / "second").values()}
    # Validation runs after five steps: before that there is nothing to compare by.
    assert {step: m.consumed_samples for step, m in saved.items()} == {6: 24}


def test_samples_are_counted_on_when_the_interval_is_another_one(tmp_path):
    first, _ = run(tmp_path, 10)
    ckpt, _ = run(tmp_path, 11, resume=first.last_model_path, every_n_train_steps=3)
    assert ckpt.consumed_samples == 44


def test_samples_and_metrics_are_those_of_the_callback_that_has_saved(tmp_path):
    def both():
        intervals = {"seldom": 100, "often": 3}
        return [
            ModelCheckpoint(
                monitor=None, dirpath=tmp_path / name, filename="{step}", every_n_train_steps=steps, save_top_k=-1
            )
            for name, steps in intervals.items()
        ]

    quiet_trainer(max_steps=4, limit_val_batches=0, callbacks=both()).fit(ToyModel(), loader())
    seldom, often = both()
    trainer = quiet_trainer(max_steps=5, limit_val_batches=0, callbacks=[seldom, often])
    trainer.fit(ToyModel(), loader(), ckpt_path=tmp_path / "often" / "step=3")
    assert seldom.consumed_samples == often.consumed_samples == 20


def test_of_two_that_save_at_one_step_the_metrics_are_those_of_the_checkpoint(tmp_path):
    class Counts(ToyModel):
        def training_step(self, batch, batch_idx):
            self.log("done", float(self.global_step), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    class Looks(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.found = dict(trainer.callback_metrics)

    def fit(epochs, resume=None):
        common = {
            "filename": "{step}",
            "save_top_k": -1,
            "always_save_context": False,
            "save_context_on_train_end": False,
        }
        batches = ModelCheckpoint(monitor=None, dirpath=tmp_path / "batches", every_n_train_steps=5, **common)
        ends = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
        of_epochs = ModelCheckpoint(monitor="done", dirpath=tmp_path / "epochs", **ends, **common)
        looks = Looks()
        trainer = quiet_trainer(
            max_epochs=epochs, limit_train_batches=5, limit_val_batches=1, callbacks=[batches, of_epochs, looks]
        )
        trainer.fit(Counts(), loader(), loader(), ckpt_path=resume)
        return looks.found

    fit(2)
    assert fit(3, tmp_path / "epochs" / "step=10")["done"] == 7.0


def test_the_same_trainer_goes_on_counting(tmp_path):
    ckpt = ModelCheckpoint(monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(max_steps=4, callbacks=[ckpt])
    model = ToyModel()
    trainer.fit(model, loader())
    written = (tmp_path / "step=4" / "manifest.json").stat().st_mtime_ns
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, loader())
    assert {m.step: m.consumed_samples for m in manifests(tmp_path).values()} == {2: 8, 4: 16, 6: 24}
    assert (tmp_path / "step=4" / "manifest.json").stat().st_mtime_ns == written


class _FullDisk(LocalDisk):
    """Has no space for ``step=2``."""

    def write(self, path, parts):
        if path.suffix == ".distcp" and path.parent.parent.name.startswith("step=2"):
            raise OSError(28, "No space left on device", str(path))
        super().write(path, parts)


def test_failed_saves_of_the_run_before_are_not_counted(tmp_path):
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, max_failed_saves=2, disk=_FullDisk()
    )
    for _ in range(2):
        trainer = quiet_trainer(max_steps=9, callbacks=[StopAt(3), ckpt])
        with pytest.raises(StoppedError):
            trainer.fit(ToyModel(), loader())
        assert trainer.global_step == 3


# --- one directory, several trainings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False])
def test_a_run_from_scratch_is_kept_where_a_longer_one_was(tmp_path, last):
    run(tmp_path, 8, monitor=None, save_top_k=2, save_last=last, every_n_train_steps=2)
    ckpt, model = run(tmp_path, 4, monitor=None, save_top_k=2, save_last=last, every_n_train_steps=2)
    assert names(tmp_path) == ["step=2", "step=4"] + ["step=4-last"] * last
    assert Path(ckpt.best_model_path) == tmp_path / "step=4"
    assert same(weights(tmp_path / "step=4"), model.state_dict())


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """As if the newest checkpoints were damaged, and it had fallen back behind them."""
    run(tmp_path, 8, monitor=None, save_top_k=-1, every_n_train_steps=2)
    back = run(
        tmp_path, 5, monitor=None, save_top_k=2, save_last=False, every_n_train_steps=1, resume=str(tmp_path / "step=2")
    )[0]
    assert names(tmp_path) == ["step=4", "step=5"]
    assert Path(back.best_model_path) == tmp_path / "step=5"
    assert {m.life for m in manifests(tmp_path).values()} == {1}


def test_the_best_of_another_training_is_not_the_best_of_this_one(tmp_path):
    options = {"save_top_k": 2, "every_n_train_steps": 1, "save_last": False, "trainer": {"val_check_interval": 1}}
    run(tmp_path, 3, Scored(scores=[0.1, 0.2, 0.3]), **options)
    first, _ = run(tmp_path, 1, Scored(scores=[0.9]), **options)
    assert Path(first.best_model_path) == tmp_path / "step=1"
    assert manifests(tmp_path)["step=1"].score == 0.9
    # Going on, and going back, is the same training: its best stays the best.
    run(tmp_path, 3, Scored(scores=[0.9, 0.8, 0.95]), resume=str(tmp_path / "step=1"), **options)
    assert {name: m.score for name, m in manifests(tmp_path).items()} == {"step=1": 0.9, "step=2": 0.8}
    again, _ = run(tmp_path, 4, Scored(scores=[0.9, 0.99, 0.99, 0.7]), resume=str(tmp_path / "step=1"), **options)
    assert {name: m.score for name, m in manifests(tmp_path).items()} == {"step=1": 0.9, "step=4": 0.7}
    assert Path(again.best_model_path) == tmp_path / "step=4"


# --- steps of several optimizers --------------------------------------------------------------------------------------


class _TwoOptimizers(ToyModel):
    """Both step with each batch, but for the first, where one is left out: the steps are odd from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch) - 1).pow(2).mean()
        optimizers = self.optimizers()
        self.manual_backward(loss)
        for optimizer in optimizers if self.global_step else optimizers[:1]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.01) for i in (0, 2)]


def test_steps_that_are_passed_by_two_optimizers_at_once_are_saved(tmp_path):
    options = {"monitor": None, "save_top_k": -1, "save_last": False, "every_n_train_steps": 4}
    run(tmp_path, 12, _TwoOptimizers(), **options)
    assert {m.step for m in manifests(tmp_path).values()} == {5, 9, 13}  # 4, 8 and 12 fall between two batches
    run(tmp_path, 16, _TwoOptimizers(), resume=str(tmp_path / "step=9"), **options)
    assert {m.step for m in manifests(tmp_path).values()} == {5, 9, 13, 17}
