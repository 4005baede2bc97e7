"""Stops in the middle of an epoch by ``trainer.should_stop``: those of ``max_time``, of EarlyStopping, of a program."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.runs import SELDOM, Case, Net, shuffled, train
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.utils.data import DataLoader, Dataset

NO_VALIDATION = {"limit_val_batches": 0}


class AfterBatch(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or len(pl_module.losses) == self.batches


class InValidation(Callback):
    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = not trainer.sanity_checking


class Waits(Net):
    """Its learning rate waits for the last validation of an epoch."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0 + (self.trainer.global_step == 5))  # worst where a stop is validated


class SumsByHand(Net):
    """Its optimizer takes the gradients of three batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


STOPS = {
    "before the rate changes": (AfterBatch(5), Case(shuffled, Waits, trainer={"val_check_interval": 4}, ckpt=SELDOM)),
    "after a batch": (AfterBatch(10), Case(shuffled, trainer=NO_VALIDATION, ckpt=SELDOM)),
    "saved beside": (AfterBatch(10), Case(shuffled, trainer=NO_VALIDATION, ckpt={**SELDOM, "async_save": True})),
    "validated": (AfterBatch(10), Case(shuffled, ckpt=SELDOM)),
    "validated at the end of an epoch": (AfterBatch(6), Case(shuffled, trainer={"val_check_interval": 4}, ckpt=SELDOM)),
    "in validation": (InValidation(), Case(shuffled, ckpt=SELDOM)),
    "at the end of an epoch": (AfterBatch(6), Case(shuffled, trainer=NO_VALIDATION, ckpt=SELDOM)),
    "while gradients are accumulated": (
        AfterBatch(3),
        Case(shuffled, trainer={**NO_VALIDATION, "accumulate_grad_batches": 2}, ckpt=SELDOM, steps=6),
    ),
    "while gradients are summed by hand": (
        AfterBatch(4),
        Case(shuffled, SumsByHand, trainer=NO_VALIDATION, ckpt=SELDOM, steps=4),
    ),
    "and validated": (AfterBatch(5), Case(shuffled, SumsByHand, ckpt=SELDOM, steps=4)),
    "before the first step": (AfterBatch(2), Case(shuffled, SumsByHand, trainer=NO_VALIDATION, ckpt=SELDOM, steps=4)),
    "behind a save of this step": (
        AfterBatch(4),
        Case(shuffled, SumsByHand, trainer=NO_VALIDATION, ckpt={"every_n_train_steps": 1, "save_top_k": 1}, steps=4),
    ),
}


@pytest.mark.parametrize(("stop", "case"), STOPS.values(), ids=STOPS)
def test_a_run_that_was_asked_to_stop_goes_on_at_the_next_batch(stop, case, tmp_path):
    straight, _, _ = train(case, tmp_path / "straight", seed=1)
    losses, _, trainer = train(replace(case, callbacks=lambda: [stop]), tmp_path / "stopped", seed=1)
    newest = tmp_path / "stopped" / f"step={trainer.global_step}"
    rest, _, _ = train(case, tmp_path / "rest", seed=1000, resume=newest)
    assert 0 < len(losses) < len(straight)
    assert losses + rest == straight


@pytest.mark.parametrize(
    "validation", [NO_VALIDATION, {"val_check_interval": None, "check_val_every_n_epoch": 1}], ids=["not", "validated"]
)
def test_a_run_that_had_all_its_epochs_goes_on_with_more_below_its_limit_of_steps(validation, tmp_path):
    case = Case(shuffled, trainer=validation, ckpt={"every_n_train_steps": 4})
    straight, _, _ = train(case, tmp_path / "straight", seed=1)
    short = replace(case, trainer={**validation, "max_epochs": 1}, ckpt={**SELDOM, "save_last": True})
    losses, _, _ = train(short, tmp_path / "short", seed=1)
    rest, _, trainer = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "short" / "step=6-last")
    assert len(losses) == 6
    assert losses + rest == straight
    assert trainer.current_epoch == 3
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 14  # the step that loggers are told


class EndsEpochs(Net):
    """Asks for a stop itself, in a hook that comes after those of callbacks; what ends an epoch decides about losses."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at, self.scale = stop_at, 1.0

    def loss(self, batch):
        return super().loss(batch) * self.scale

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.losses) == self.stop_at:
            self.trainer.should_stop = True

    def on_train_epoch_end(self):
        self.scale *= 1.1


OWN_STOPS = {
    "after a batch": (10, Case(shuffled, EndsEpochs, trainer=NO_VALIDATION, ckpt=SELDOM)),
    "at the end of an epoch": (6, Case(shuffled, EndsEpochs, trainer=NO_VALIDATION, ckpt=SELDOM)),
    "validated": (10, Case(shuffled, EndsEpochs, ckpt=SELDOM)),
    "validated at the end of an epoch": (6, Case(shuffled, EndsEpochs, trainer={"val_check_interval": 4}, ckpt=SELDOM)),
    "while gradients are accumulated": (
        3,
        Case(shuffled, EndsEpochs, trainer={**NO_VALIDATION, "accumulate_grad_batches": 2}, ckpt=SELDOM, steps=6),
    ),
}


@pytest.mark.parametrize(("stop_at", "case"), OWN_STOPS.values(), ids=OWN_STOPS)
def test_a_module_that_asks_for_the_stop_itself(stop_at, case, tmp_path):
    straight, _, _ = train(case, tmp_path / "straight", seed=1)
    losses, _, trainer = train(replace(case, model=lambda: EndsEpochs(stop_at)), tmp_path / "stopped", seed=1)
    rest, _, _ = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "stopped" / f"step={trainer.global_step}")
    assert 0 < len(losses) < len(straight)
    assert losses + rest == straight


class StopsInValidation(EndsEpochs):
    """As EarlyStopping does, which comes before checkpoints are saved, and this after."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def on_validation_end(self):
        if len(self.losses) == self.stop_at:
            self.trainer.should_stop = True


def test_a_module_that_asks_for_the_stop_when_a_validation_in_mid_epoch_ends(tmp_path):
    case = Case(shuffled, StopsInValidation, trainer={"val_check_interval": 4}, ckpt=SELDOM)
    straight, _, _ = train(case, tmp_path / "straight", seed=1)
    losses, _, trainer = train(replace(case, model=lambda: StopsInValidation(4)), tmp_path / "stopped", seed=1)
    rest, _, _ = train(case, tmp_path / "rest", seed=1000, resume=tmp_path / "stopped" / f"step={trainer.global_step}")
    assert len(losses) == 4
    assert losses + rest == straight


class PlainSteps(Net):
    """Takes its steps with a plain optimizer, which Lightning does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.note(self.loss(batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("validation", [NO_VALIDATION, {}], ids=["no validation", "validation"])
def test_a_stop_is_not_put_off_until_a_step_that_nobody_counts(validation, tmp_path):
    trainer = {**validation, "max_steps": -1, "max_epochs": 2}
    case = Case(shuffled, PlainSteps, trainer=trainer, ckpt=SELDOM, callbacks=lambda: [AfterBatch(4)])
    losses, _, _ = train(case, tmp_path, seed=1)
    assert len(losses) == 4


class Drawn(Dataset):
    """Validates with numbers of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(3)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), self.rng.random(), dtype=torch.float32)


class Validated(pl.LightningDataModule):
    def train_dataloader(self):
        return shuffled()

    def val_dataloader(self):
        return DataLoader(Drawn(), batch_size=4)


class CountsValidations(Net):
    def __init__(self):
        super().__init__()
        self.count, self.seen = 0, []

    def on_validation_epoch_end(self):
        self.count += not self.trainer.sanity_checking
        self.seen.append((self.count, self.trainer.callback_metrics["val_loss"].item()))


class Notes(Callback):
    """Has a state, of which Lightning is given the counter itself."""

    def __init__(self):
        self.validated = Counter()

    def on_validation_end(self, trainer, pl_module):
        self.validated[trainer.global_step] += 1

    def state_dict(self):
        return {"validated": self.validated}

    def load_state_dict(self, state):
        self.validated = state["validated"]


def test_the_validation_of_a_stop_is_as_if_it_had_not_been(tmp_path):
    """No run validates there that is not stopped, so the next one goes on as if there had been none."""

    def run(name, seed, resume=None, callbacks=()):
        stopping, notes = EarlyStopping("val_loss", patience=100), Notes()
        case = Case(Validated, CountsValidations, ckpt=SELDOM, callbacks=lambda: [stopping, notes, *callbacks])
        _, _, trainer = train(case, tmp_path / name, seed, resume)
        return trainer.lightning_module.seen, (stopping.wait_count, stopping.best_score, notes.validated)

    straight = run("straight", 1)
    stopped, (_, _, validated) = run("stopped", 1, callbacks=[AfterBatch(10)])
    rest, of_callbacks = run("rest", 1000, resume=tmp_path / "stopped" / "step=10")
    assert len(stopped) == 5  # the first is the sanity check, the last that of the stop
    assert [*validated] == [0, 3, 6, 9, 10]
    assert (stopped[:-1] + rest, of_callbacks) == straight


class ActsInValidation(Net):
    """Goes back to the weights that it has begun with, lowers its rate, or is another one while it is validated."""

    acts = ""

    def on_fit_start(self):
        self.begun = {name: value.clone() for name, value in self.net.state_dict().items()}

    def on_validation_start(self):
        self.kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        if self.acts == "swaps":
            self.net.load_state_dict(self.begun)

    def on_validation_end(self):
        if self.acts == "lowers":
            self.optimizers().param_groups[0]["lr"] *= 0.5
        self.net.load_state_dict(self.begun if self.acts == "goes back" else self.kept)


@pytest.mark.parametrize(("acts", "told"), [("goes back", 1), ("lowers", 1), ("swaps", 0), ("", 0)])
@pytest.mark.parametrize(("batches", "due"), [(4, False), (6, True)], ids=["for the stop", "due"])
def test_weights_that_the_validation_of_a_stop_sets_are_named(acts, told, batches, due, tmp_path, caplog):
    """They are in the checkpoint, which has the metrics of that validation."""

    def model():
        module = ActsInValidation()
        module.acts = acts
        return module

    case = Case(shuffled, model, ckpt=SELDOM, callbacks=lambda: [AfterBatch(batches)])
    train(case, tmp_path, seed=1)
    assert caplog.text.count("was changed by the validation that there was because training stopped") == told * (
        not due
    )
