"""Step times: in the loggers, in the log file, and at next to no cost."""

from __future__ import annotations

import csv
import logging
import re
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from toy import ToyModel, loader, quiet_trainer

import nemologger as nl
from nemologger.callbacks import DeltaTimingCallback, TimingCallback
from nemologger.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("clock")

STEP, BACKWARD = "train_step_timing in s", "train_backward_timing in s"
VALIDATION, TEST = "validation_step_timing in s", "test_step_timing in s"


class Paced(ToyModel):
    """Its steps take a known time."""

    pause = 0.02
    val_pause = 0.04

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        time.sleep(self.pause / 2)
        super().backward(loss)

    def validation_step(self, batch, batch_idx):
        time.sleep(self.val_pause)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        time.sleep(self.pause * 3)


def rows(logger: CSVLogger, name: str) -> list[tuple[int, float]]:
    """Step and value of each line that has this metric."""
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def test_all_kinds_of_steps_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 1, "limit_val_batches": 2, "limit_test_batches": 2}
    trainer = quiet_trainer(max_steps=5, callbacks=[TimingCallback()], **options)
    trainer.fit(Paced(), loader(), loader())
    trainer.test(Paced(), loader(), verbose=False)
    assert [step for step, _ in rows(logger, STEP)] == [0, 1, 2, 3, 4]
    for name, took, count in ((STEP, 0.03, 5), (BACKWARD, 0.01, 5), (VALIDATION, 0.04, 2), (TEST, 0.06, 2)):
        values = [value for _, value in rows(logger, name)]
        assert values == pytest.approx([took] * count), name


def test_the_progress_bar_has_the_step_time():
    class Looks(Callback):
        def on_train_end(self, trainer, pl_module):
            self.seen = dict(trainer.progress_bar_metrics)

    looks = Looks()
    trainer = quiet_trainer(max_steps=4, callbacks=[TimingCallback(), looks], log_every_n_steps=2)
    trainer.fit(Paced(), loader())
    assert looks.seen[STEP] == pytest.approx(0.03)
    assert BACKWARD not in looks.seen


def test_the_window_reaches_over_the_steps_that_are_not_logged(tmp_path):
    class SlowOnce(Paced):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                time.sleep(0.8)
            return super().training_step(batch, batch_idx)

    found = {}
    for size, reduction in ((1, "mean"), (4, "max"), (2, "max")):
        logger = CSVLogger(tmp_path, version=f"{size}-{reduction}")
        timing = TimingCallback(timer_kwargs={"buffer_size": size, "reduction": reduction})
        trainer = quiet_trainer(max_steps=4, callbacks=[timing], logger=logger, log_every_n_steps=4)
        trainer.fit(SlowOnce(), loader())
        ((step, found[size]),) = rows(logger, STEP)
        assert step == 3
    assert found == pytest.approx({1: 0.03, 4: 0.83, 2: 0.03})


@pytest.mark.parametrize("shape", ["tensor", "pair", "tokens", "text", "input_ids"])
def test_tokens_per_second(tmp_path, shape):
    class Batches(ToyModel):
        def training_step(self, batch, batch_idx):
            time.sleep(0.05 * (batch_idx + 1))
            tokens = batch if shape == "tensor" else batch[0] if shape == "pair" else batch[shape]
            return super().training_step(tokens.float(), batch_idx)

    samples = torch.arange(48, dtype=torch.long).reshape(6, 8)
    data = {"tensor": list(samples), "pair": [(s, 1) for s in samples]}.get(shape, [{shape: s} for s in samples])
    logger = CSVLogger(tmp_path)
    timing = TimingCallback(log_tokens_per_sec=True, timer_kwargs={"buffer_size": 2})
    trainer = quiet_trainer(max_steps=3, callbacks=[timing], logger=logger, log_every_n_steps=1)
    trainer.fit(Batches(), torch.utils.data.DataLoader(data, batch_size=2))
    speeds = [value for _, value in rows(logger, "tokens_per_sec_per_gpu")]
    assert speeds == pytest.approx([16 / 0.05, 32 / 0.15, 32 / 0.25])


def test_a_batch_without_tokens_is_an_error_at_the_first_step():
    class Batches(ToyModel):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["image"], batch_idx)

    trainer = quiet_trainer(
        max_steps=3, callbacks=[TimingCallback(log_tokens_per_sec=True)], enable_checkpointing=False
    )
    data = torch.utils.data.DataLoader([{"image": torch.ones(8)}] * 6, batch_size=2)
    with pytest.raises(ConfigurationError, match=r"no tokens in a batch that is the keys \['image'\]"):
        trainer.fit(Batches(), data)
    assert trainer.global_step == 1


def test_with_gradient_accumulation_a_step_is_a_batch(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        max_steps=2, callbacks=[TimingCallback()], logger=logger, log_every_n_steps=1, accumulate_grad_batches=2
    )
    trainer.fit(Paced(), loader())
    assert [step for step, _ in rows(logger, STEP)] == [0, 1]


def test_manual_optimization_and_no_backward():
    class Manual(ToyModel):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    trainer = quiet_trainer(max_steps=2, callbacks=[TimingCallback()], log_every_n_steps=1, enable_checkpointing=False)
    trainer.fit(Manual(), loader())
    assert {STEP, BACKWARD} <= set(trainer.callback_metrics)


@pytest.mark.parametrize("kind", [TimingCallback, DeltaTimingCallback])
def test_bad_arguments(kind):
    with pytest.raises(ConfigurationError, match=kind.__name__):
        kind(timer_kwargs={"reduction": "median"})


# --- from end to end --------------------------------------------------------------------------------------------------


def laps(caplog, name: str) -> list[tuple[int, float]]:
    found = [re.fullmatch(rf"Step (\d+): {name}=([\d.]+)", record.getMessage()) for record in caplog.records]
    return [(int(match[1]), float(match[2])) for match in found if match]


def test_delta_times_are_in_the_log_and_not_in_the_loggers(tmp_path, caplog):
    class SlowData(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            time.sleep(0.01)
            return torch.ones(8)

    caplog.set_level(logging.INFO, logger="nemologger")
    trainer = quiet_trainer(
        max_steps=6, callbacks=[DeltaTimingCallback()], limit_val_batches=2, val_check_interval=2, limit_test_batches=1
    )
    model = Paced()
    model.val_pause = 0.4
    data = torch.utils.data.DataLoader(SlowData(), batch_size=4)
    trainer.fit(model, data, data)
    trainer.test(model, data, verbose=False)
    train = laps(caplog, STEP)
    assert [step for step, _ in train] == [0, 1, 2, 3, 0, 1]
    # A step and its data; not the validation in front of every second one.
    assert [seconds for _, seconds in train] == pytest.approx([0.07] * 6)
    assert [step for step, _ in laps(caplog, VALIDATION)] == [0, 1] * 3
    assert [seconds for _, seconds in laps(caplog, VALIDATION)] == pytest.approx([0.44] * 6)
    assert [seconds for _, seconds in laps(caplog, TEST)] == pytest.approx([0.1])
    assert STEP not in trainer.callback_metrics


def test_delta_times_of_a_run_that_goes_on_within_an_epoch(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="nemologger")
    for steps in (3, 5):
        ckpt = nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor=None, verbose=False)
        trainer = quiet_trainer(max_steps=steps, callbacks=[DeltaTimingCallback(), ckpt], limit_val_batches=0)
        trainer.fit(ToyModel(), loader(), ckpt_path=None if steps == 3 else tmp_path / "step=3-last")
    assert [step for step, _ in laps(caplog, STEP)] == [0, 1, 2, 3, 4]
