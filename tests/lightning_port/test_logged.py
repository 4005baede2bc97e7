"""Under which step batches are logged."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


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
