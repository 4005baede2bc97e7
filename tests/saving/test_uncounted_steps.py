"""Programs of which Lightning counts no step of an optimizer: they are saved, stopped and resumed all the same."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyModel, manifests, names, quiet_trainer

import nemologger as nl
from nemologger.callbacks import EMA, PreemptionCallback

BATCHES = 10  # of an epoch


class Plain(ToyModel):
    """Takes the optimizer of configure_optimizers() without Lightning's wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen: list[float] = []

    def optimizer(self):
        return self.optimizers(use_pl_optimizer=False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.item())
        self.zero_grad()
        loss.backward()
        self.step()

    def step(self):
        self.optimizer().step()


class Own(Plain):
    """Lightning is given no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.optim.Adam(self.parameters(), lr=0.05)

    def configure_optimizers(self):
        return None

    def optimizer(self):
        return self.own


class ByHand(Own):
    """There is none."""

    def step(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter -= 0.01 * parameter.grad


class Stop(Callback):
    def __init__(self, after: int, how: str) -> None:
        self.after, self.how = after, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(pl_module.seen) == self.after:
            if self.how == "should_stop":
                trainer.should_stop = True
            elif self.how == "error":
                raise ZeroDivisionError
            else:
                os.kill(os.getpid(), signal.SIGTERM)


def train(kind, directory, *callbacks, **ckpt):
    torch.manual_seed(1)
    model = kind()
    data = DataLoader(ToyData(), batch_size=BATCH, shuffle=True)
    trainer = quiet_trainer(max_epochs=2, max_steps=-1, limit_val_batches=0, callbacks=list(callbacks))
    log = nl.NeMoLogger(
        name="x",
        log_dir=str(directory),
        tensorboard=None,
        ckpt=nl.ModelCheckpoint(monitor=None, **{"every_n_train_steps": 2, **ckpt}),
    )
    resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
    with suppress(ZeroDivisionError, SystemExit):
        nl.train(model, data, trainer, log, resume)
    return model.seen


@pytest.mark.parametrize("how", ["should_stop", "error", "SIGTERM"])
@pytest.mark.parametrize("kind", [Plain, Own, ByHand])
def test_the_next_start_goes_on_to_the_bit(tmp_path, kind, how):
    straight = train(kind, tmp_path / "straight")
    assert len(straight) == 2 * BATCHES
    stopped = train(kind, tmp_path / "run", Stop(5, how), PreemptionCallback())
    assert len(stopped) in (5, 6)
    rest = train(kind, tmp_path / "run")
    saved = len(straight) - len(rest)
    assert saved == (4 if how == "error" else len(stopped))
    assert straight[:saved] + rest == straight


def test_every_interval_is_saved_under_a_name_of_its_own(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(Plain, tmp_path, every_n_train_steps=3, save_top_k=-1, save_last=False, filename="{epoch}")
    kept = manifests(tmp_path / "x" / "checkpoints")
    assert sorted(one.consumed_samples for one in kept.values()) == [n * BATCH for n in (3, 6, 9, 12, 15, 18, 20)]
    assert len([one for one in caplog.messages if "Lightning has counted no step" in one]) == 1


def test_epochs_are_saved(tmp_path):
    train(
        Plain, tmp_path, every_n_train_steps=None, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_last=False
    )
    assert names(tmp_path / "x" / "checkpoints") == ["epoch=0", "epoch=1"]


def test_averages_of_weights_follow(tmp_path):
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights.append(pl_module.net[2].weight.detach().clone())

    weights: list[torch.Tensor] = []
    train(Plain, tmp_path, EMA(decay=0.5), Look())
    averaged, expected = ToyModel(), ToyModel().net[2].weight.detach().clone()
    for weight in weights:
        expected = 0.5 * expected + 0.5 * weight
    nl.load_weights(next((tmp_path / "x" / "checkpoints").glob("*-last")), averaged, ema=True)
    torch.testing.assert_close(averaged.net[2].weight.detach(), expected)


class InTwos(Plain):
    """Lightning counts its steps; each takes the gradients of two batches."""

    def step(self):
        if len(self.seen) % 2 == 0:
            self.optimizers().step()


def test_averages_follow_from_the_first_step_that_is_counted(tmp_path):
    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.on_train_end(trainer, pl_module)

        def on_train_end(self, trainer, pl_module):
            weights.append(pl_module.net[2].weight.detach().clone())

    weights: list[torch.Tensor] = []
    average = EMA(decay=0.9)
    train(InTwos, tmp_path, average, Look())
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.averages["net.2.weight"], expected)


class LeavesOut(DataLoader):
    """The last batch of an epoch is None: no step is taken."""

    def __iter__(self):
        yield from [*super().__iter__()][:-1]
        yield None


def test_where_steps_are_counted_each_is_saved_once(tmp_path):
    ckpt = nl.ModelCheckpoint(
        dirpath=tmp_path / "a", monitor=None, every_n_train_steps=3, save_top_k=2, save_last=False, filename="{step}"
    )
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[ckpt])
    trainer.fit(ToyModel(), LeavesOut(ToyData(), batch_size=BATCH))
    assert names(tmp_path / "a") == ["step=6", "step=9"]
    assert {one.consumed_samples for one in manifests(tmp_path / "a").values()} == {6 * BATCH, 9 * BATCH}


def test_one_that_a_trainer_is_given_for_its_second_fit(tmp_path):
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(ToyModel(), DataLoader(ToyData(), batch_size=BATCH))
    trainer.fit_loop.max_epochs = 2
    trainer.callbacks.append(
        nl.ModelCheckpoint(dirpath=tmp_path / "a", monitor=None, every_n_train_steps=15, filename="{step}")
    )
    trainer.fit(ToyModel(), DataLoader(ToyData(), batch_size=BATCH))
    assert names(tmp_path / "a") == ["step=15", "step=20", "step=20-last"]


def test_a_fit_that_cannot_begin_says_why_and_no_more(tmp_path, caplog):
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path / "a", monitor="val_loss")
    with pytest.raises(nl.ConfigurationError, match="can never appear"):
        quiet_trainer(max_epochs=1, callbacks=[ckpt]).fit(ToyModel(), DataLoader(ToyData(), batch_size=BATCH))
    assert not [one for one in caplog.messages if "could not be saved" in one]
