"""What belongs to an epoch as a whole: what is logged for it, the hooks that begin and end it, and what waits for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from exact.loaders.test_loaders import Stream
from exact.runs import BATCH, Case, Net, check, shuffled, train
from exact.test_training import EPOCHS
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader
from torchmetrics.wrappers import MetricTracker, Running

QUIET = {"limit_val_batches": 0}
OFTEN = {**EPOCHS, "log_every_n_steps": 1}


class Rows(Logger):
    """Remembers what is logged."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *arguments, **options):
        pass


class Logs(Net):
    """Means, extremes and metrics of an epoch; a schedule that waits for one of them."""

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.by_hand = torchmetrics.MeanMetric()
        self.errors = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
        self.validation = torchmetrics.MeanMetric()
        self.window = Running(torchmetrics.MeanMetric(), window=4)
        self.validation_window = Running(torchmetrics.MeanMetric(), window=3)
        self.tracker = MetricTracker(torchmetrics.MeanMetric(), maximize=False)
        self.extremes = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())
        self.validation_extremes = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())

    def on_train_epoch_start(self):
        self.tracker.increment()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.by_hand(loss.detach())
        self.errors(self.net(batch).detach(), torch.ones(len(batch), 1))
        self.log_dict(self.errors, on_step=False, on_epoch=True)
        self.window.update(loss.detach())
        self.extremes.update(loss.detach())
        self.tracker.update(loss.detach())
        self.log("best", self.tracker.best_metric(), on_step=True, on_epoch=False)
        counted = {"window": self.window.compute(), "lowest": self.extremes.compute()["min"]}
        self.log_dict(counted, on_step=True, on_epoch=False)
        if batch_idx == 0:
            self.log("first", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.validation(self.net(batch).mean())
        self.log("validation", self.validation)
        self.validation_window.update(self.net(batch).mean())
        self.log("validation_window", self.validation_window)
        self.validation_extremes.update(torch.tensor(float(self.global_step)))
        self.log("validation_lowest", self.validation_extremes.compute()["min"])

    def on_train_epoch_end(self):
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.7, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "loss_epoch"}}


class Judge:
    def __init__(self):
        self.worst = torchmetrics.MaxMetric()


class Judged(Net):
    """Weighs by metrics that are no parts of it: in a list, within another in a dictionary, in an object, in a callback."""

    def __init__(self):
        super().__init__()
        self.listed = [torchmetrics.SumMetric()]
        self.by_name = {"train": [torchmetrics.MetricCollection([torchmetrics.MeanMetric()])]}
        self.judge = Judge()
        self.callback = Judges()

    def configure_callbacks(self):
        return [self.callback]

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        metrics = [self.listed[0], self.by_name["train"][0]["MeanMetric"], self.judge.worst, self.callback.mean]
        for metric in metrics[:3]:
            metric.update(loss.detach())
        return self.note(loss * (1 + sum(float(metric.compute()) for metric in metrics)))


class Judges(Callback):
    def __init__(self):
        self.mean = torchmetrics.MeanMetric()
        self.mean.update(1.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mean.update(outputs["loss"])


class Freezes(Net):
    """What is trained, and how, changes from epoch to epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        self.net[0].requires_grad_(self.current_epoch > 0)
        self.net[1].p = 0.5 - self.current_epoch / 10
        if self.current_epoch == 2:
            self.net[1].eval()


class Clips(Callback):
    """Clips gradients harder from the second epoch on."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.gradient_clip_val = 0.01


def stops() -> list[Any]:
    return [EarlyStopping("loss_epoch", patience=5)]


def streamed() -> Any:
    return DataLoader(Stream(), batch_size=BATCH)


LOGGED = {
    "epochs": Case(shuffled, Logs, trainer=OFTEN, callbacks=stops),
    "no validation": Case(shuffled, Logs, trainer={**OFTEN, **QUIET}, callbacks=stops),
    "unsized": Case(streamed, Logs, trainer={**OFTEN, "num_sanity_val_steps": 0}, callbacks=stops),
}
OTHERS = {
    "frozen for an epoch": Case(shuffled, Freezes, trainer=EPOCHS),
    "judged from outside": Case(shuffled, Judged, at=[4, 9]),
    "another accumulation": Case(
        shuffled, trainer=EPOCHS, callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})], steps=12
    ),
    "other clipping": Case(shuffled, trainer=EPOCHS, callbacks=lambda: [Clips()], at=[8, 12]),
    "stochastic weight averaging": Case(
        shuffled,
        trainer={**EPOCHS, "max_epochs": 4},
        callbacks=lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=3)],
        at=(6, 7, 12, 15, 18, 20),
    ),
}


@pytest.mark.parametrize("case", LOGGED.values(), ids=LOGGED)
def test_what_is_logged_for_an_epoch_counts_all_of_it(case, tmp_path):
    runs = []

    def run(directory, seed, resume=None):
        case.trainer["logger"] = Rows()
        losses, batches, trainer = train(case, directory, seed, resume)
        runs.append((losses, trainer.logger.rows, [float(group["lr"]) for group in trainer.optimizers[0].param_groups]))
        return batches

    batches = run(tmp_path / "straight", 1)
    losses, rows, rate = runs[0]
    assert rate[0] < 1e-2
    for step in range(1, 18):
        run(tmp_path / f"from-{step}", 1000 + step, tmp_path / "straight" / f"step={step}")
        assert runs[-1] == (losses[batches[step] :], rows[len(rows) - len(runs[-1][1]) :], rate), f"step {step}"
        assert runs[-1][1][0][0] <= step  # none is left out


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_what_lasts_longer_than_a_batch(case, tmp_path):
    check(case, tmp_path)


class Louder(Logs):
    def log(self, name, value, **options):
        super().log(name, value, **{**options, "prog_bar": True})


class Otherwise(Logs):
    """Logs a metric in place of a number, a number in place of a metric, and a mean in place of a maximum."""

    def log(self, name, value, **options):
        if name == "loss":
            self.mean(value.detach())
            value = self.mean
        elif name == "mean":
            value = torch.tensor(1.0)
        super().log(name, value, **{**options, "reduce_fx": "mean"})

    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.ended = {name: float(value) for name, value in self.trainer.callback_metrics.items()}


def test_what_is_logged_may_change_between_two_lives(tmp_path):
    case = Case(shuffled, Logs, trainer=EPOCHS, at=(3,))
    train(case, tmp_path, 1)
    case.model = Louder
    assert len(train(case, tmp_path / "louder", 2, tmp_path / "step=3")[0]) == 15
    case.model, case.trainer = Otherwise, {**EPOCHS, "max_epochs": 1}
    losses, _, trainer = train(case, tmp_path / "otherwise", 2, tmp_path / "step=3")
    assert len(losses) == 3
    assert trainer.lightning_module.ended["mean"] == 1
    assert min(losses) < trainer.lightning_module.ended["max"] < max(losses)  # their mean: it begins anew
