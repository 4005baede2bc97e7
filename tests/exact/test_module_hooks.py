"""Modules that change state in hooks of their own, which Lightning calls after those of the callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact.runs import Case, Net, check, shuffled, train
from lightning.pytorch.callbacks import Callback
from processes import torchrun
from torch import nn

import nemologger as nl
from nemologger.callbacks import MaxTimePerRun

EPOCHS = {"max_epochs": 3, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}


class Follows(Net):
    """A second network follows the trained one, as in BYOL, DINO, MoCo, DQN and SAC; random numbers are drawn as well."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Linear(4, 1).requires_grad_(False)

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.net(batch) - self.target(batch)).pow(2).mean()

    @torch.no_grad()
    def follow(self) -> None:
        torch.rand(2)
        for parameter in self.target.parameters():
            parameter.lerp_(self.net[2].weight.mean(), 0.1)


class AfterBatch(Follows):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.follow()


class AfterValidation(Follows):
    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.follow()


class AfterEpoch(Follows):
    def on_train_epoch_end(self) -> None:
        self.follow()


class AfterAll(AfterBatch, AfterValidation, AfterEpoch):
    pass


class ValidatesAverage(Net):
    """Validates with other weights than it trains with, and takes them back itself."""

    def on_validation_start(self) -> None:
        self.kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        for value in self.net.parameters():
            value.data.zero_()

    def on_validation_end(self) -> None:
        self.net.load_state_dict(self.kept)


CASES = {
    "batch": Case(shuffled, AfterBatch, at=(1, 6)),
    "batch, async": Case(shuffled, AfterBatch, ckpt={"async_save": True}, at=(5,)),
    "batch, overlapped": Case(shuffled, AfterBatch, ckpt={"async_save": True, "staging": "overlapped"}, at=(2,)),
    "batch, accumulate": Case(shuffled, AfterBatch, trainer={"accumulate_grad_batches": 2}, steps=8, at=(2, 3)),
    "batch, no validation": Case(shuffled, AfterBatch, trainer={"limit_val_batches": 0}, at=(5,)),
    "validation": Case(shuffled, AfterValidation, at=(3,)),
    "validation, async": Case(shuffled, AfterValidation, ckpt={"async_save": True}, at=(3,)),
    "validation swaps": Case(shuffled, ValidatesAverage, at=(3,)),
    "epoch": Case(shuffled, AfterEpoch, trainer=EPOCHS, at=(6,)),
    "all, by epoch": Case(
        shuffled, AfterAll, trainer=EPOCHS, ckpt={"every_n_train_steps": None, "every_n_epochs": 1}, at=(6,)
    ),
    "all, after epochs": Case(
        shuffled,
        AfterAll,
        trainer=EPOCHS,
        ckpt={"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True},
        at=(6,),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_the_module_does_after_the_callbacks_is_saved(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.dist
def test_two_ranks(tmp_path):
    torchrun(Path(__file__).with_name("ddp.py"), 2, tmp_path, "module's own hooks")


class Reached(MaxTimePerRun):
    """Its time is over after so many steps."""

    def __init__(self, step: int) -> None:
        super().__init__("00:01:00:00")
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.step:
            self._end = 0.0


@pytest.mark.parametrize(("model", "step"), [(AfterBatch, 3), (AfterAll, 2)])
def test_a_run_that_is_stopped_has_called_the_modules_own_hook(model, step, tmp_path):
    # Stopped in front of validation, or behind it: val_check_interval is 3.
    straight, _, _ = train(Case(shuffled, model), tmp_path / "straight", 1)
    ckpt = {"every_n_train_steps": 1000, "save_last": True}
    stopped = Case(shuffled, model, ckpt=ckpt, callbacks=lambda: [Reached(step)])
    losses, _, _ = train(stopped, tmp_path / "stopped", 1)
    (last,) = (tmp_path / "stopped").glob("*-last")
    assert losses + train(Case(shuffled, model), tmp_path / "on", 7, last)[0] == straight


def test_validation_does_not_shift_training_whatever_hooks_draw(tmp_path):
    class Draws(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            torch.rand(1)

        def on_validation_end(self):
            torch.rand(3)

    runs = [train(Case(shuffled, Draws, trainer={"limit_val_batches": n}), tmp_path / str(n), 1)[0] for n in (0, 1)]
    assert runs[0] == runs[1]


def test_what_was_put_off_is_forgotten_if_another_callback_fails(tmp_path):
    class Fails(Callback):
        def __init__(self) -> None:
            self.calls = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("on purpose")

    fails = Fails()
    ckpt = nl.ModelCheckpoint(
        dirpath=tmp_path, monitor=None, every_n_train_steps=1, save_top_k=-1, save_last=False, filename="{step}"
    )
    trainer = nl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ckpt],
    )  # fmt: skip
    trainer.callbacks.append(fails)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(AfterAll(), shuffled(), shuffled())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step=1"]
    trainer.validate(AfterAll(), shuffled(), verbose=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step=1"]
    assert "on_batch_end" not in vars(trainer._logger_connector)
