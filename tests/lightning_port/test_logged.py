"""Under which step batches are logged."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


def test_metrics_have_all_their_digits_again():
    trainer = quiet_trainer()
    lightning_port.show_metrics(trainer, {"of 32": 7.0}, prog_bar=False)  # as a learning rate finder leaves them
    lightning_port.restore_metrics(trainer, {"of 64 bits": 0.1, "of 32": 0.5, "none": float("nan")})
    metrics = trainer.callback_metrics
    assert metrics["of 64 bits"].item() == 0.1
    assert metrics["of 32"].item() == 0.5
    assert metrics["of 32"].dtype == metrics["none"].dtype == torch.float32


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_logged_with_its_last_batch(accumulate):
    class Asks(pl.Callback):
        due: list[tuple[int, int]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if lightning_port.log_is_due(trainer, 2):
                self.due.append((batch_idx + 1, trainer.global_step))

    asks = Asks()
    asks.due = []
    quiet_trainer(
        max_steps=3,
        callbacks=[asks],
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
    ).fit(ToyModel(), loader())
    assert asks.due == [(2 * accumulate, 2)]
