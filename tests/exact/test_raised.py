"""Exceptions in hooks of the program, with ``save_on_exception=True``: what follows the hook is not left out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from exact.loaders.test_loaders import Stream
from exact.loaders.test_replayed import Steady
from exact.runs import BATCH, SELDOM, Case, Net, Stopped, shuffled, train
from torch.utils.data import DataLoader

EPOCHS = {"val_check_interval": None, "check_val_every_n_epoch": 1}
BY_STEP = {"val_check_interval": 3}


class Hooks(Net):
    """Raises in one hook at one step. The end of an epoch, and a schedule that waits for validation, decide about losses."""

    def __init__(self, hook="", step=0):
        super().__init__()
        self.raises = hook, step
        self.validated = []  # at which step

    def reach(self, hook):
        if not self.trainer.sanity_checking and (hook, self.trainer.global_step) == self.raises:
            raise Stopped

    def on_train_epoch_start(self):
        self.reach("on_train_epoch_start")

    def on_train_batch_start(self, batch, batch_idx):
        self.reach("on_train_batch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.reach("on_train_batch_end")

    def on_validation_start(self):
        self.reach("on_validation_start")

    def on_validation_epoch_end(self):
        self.reach("on_validation_epoch_end")

    def on_validation_end(self):
        self.validated.append(self.trainer.global_step)

    def on_train_epoch_end(self):
        with torch.no_grad():
            self.net[0].weight.mul_(0.9)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        if self.trainer.limit_val_batches == 0:
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


POINTS = {
    "last batch": ("on_train_batch_end", 6, EPOCHS),
    "last batch, no validation": ("on_train_batch_end", 6, {"limit_val_batches": 0}),
    "batch before a validation": ("on_train_batch_end", 3, BY_STEP),
    "validation begins": ("on_validation_start", 6, EPOCHS),
    "validation begins within an epoch": ("on_validation_start", 9, BY_STEP),
    "validation ends": ("on_validation_epoch_end", 6, EPOCHS),
    "epoch begins": ("on_train_epoch_start", 6, EPOCHS),
    "epoch begins, limit of epochs": ("on_train_epoch_start", 6, {**EPOCHS, "max_steps": -1, "max_epochs": 3}),
    "first batch": ("on_train_batch_start", 6, EPOCHS),
}


@pytest.mark.parametrize(("hook", "step", "trainer"), POINTS.values(), ids=POINTS)
def test_what_follows_a_hook_that_raised_is_not_left_out(hook, step, trainer, tmp_path):
    case = Case(shuffled, Hooks, trainer=trainer, ckpt={**SELDOM, "save_on_exception": True})
    straight, _, whole = train(case, tmp_path / "straight", seed=1)
    losses, _, raised = train(replace(case, model=lambda: Hooks(hook, step)), tmp_path / "raised", seed=1)
    rest, _, resumed = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "raised" / f"step={step}")
    assert len(losses) == step
    assert losses + rest == straight
    validated = raised.lightning_module.validated + resumed.lightning_module.validated
    assert [at for at in validated if at] == [at for at in whole.lightning_module.validated if at]


def undrawn():
    return DataLoader(torch.arange(88.0).view(22, 4) / 88, batch_size=BATCH, shuffle=True)


@pytest.mark.parametrize("step", [4, 5, 9, 11])
@pytest.mark.parametrize("trainer", [EPOCHS, BY_STEP], ids=["validated in each epoch", "by step"])
def test_a_batch_that_had_begun_comes_once_more_and_counts_once(step, trainer, tmp_path, caplog):
    """The sixth of each epoch is the last. That it may have been drawn already is said."""
    case = Case(undrawn, Hooks, trainer=trainer, ckpt={**SELDOM, "save_on_exception": True})
    straight, _, whole = train(case, tmp_path / "straight", seed=1)
    hook = partial(Hooks, "on_train_batch_start", step)
    losses, _, raised = train(replace(case, model=hook), tmp_path / "raised", seed=1)
    assert f"step {step + 1} was under way when the checkpoint was saved" in caplog.text
    rest, _, resumed = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "raised" / f"step={step}")
    assert losses + rest == straight
    validated = raised.lightning_module.validated + resumed.lightning_module.validated
    assert [at for at in validated if at] == [at for at in whole.lightning_module.validated if at]


class Steps(Hooks):
    configure_optimizers = Net.configure_optimizers


@pytest.mark.parametrize("stream", [Steady, Stream])
@pytest.mark.parametrize("step", [6, 8])
def test_the_first_batch_of_a_stream_comes_once_more(stream, step, tmp_path):
    case = Case(lambda: DataLoader(stream(), batch_size=BATCH), Steps, trainer={"limit_val_batches": 0})
    case.ckpt = {**SELDOM, "save_on_exception": True}
    straight, _, _ = train(case, tmp_path / "straight", seed=1)
    raises = replace(case, model=lambda: Steps("on_train_batch_start", step))
    losses, _, _ = train(raises, tmp_path / "raised", seed=1)
    rest, _, _ = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "raised" / f"step={step}")
    assert losses + rest == straight


class InStep(Hooks):
    def on_before_backward(self, loss):
        self.reach("on_before_backward")


@pytest.mark.parametrize("hook", ["on_before_backward", "on_train_batch_end"])
def test_a_step_that_raised_is_named_as_it_may_have_drawn_and_counted(hook, tmp_path, caplog):
    case = Case(shuffled, lambda: InStep(hook, 4), ckpt={**SELDOM, "save_on_exception": True})
    train(case, tmp_path, seed=1)
    assert ("step 5 was under way when the checkpoint was saved" in caplog.text) == (hook == "on_before_backward")
