"""How a fit ends."""

from __future__ import annotations

import lightning.pytorch as pl
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


def test_which_batch_ends_training_and_which_is_logged():
    class Looks(pl.Callback):
        def __init__(self):
            self.over, self.logged = [], []

        def on_train_batch_end(self, trainer, *args):
            self.over.append(lightning_port.is_over(trainer))
            self.logged.append(lightning_port.logs_this_batch(trainer))

    for limits, batches in (({"max_steps": 6}, 6), ({"max_epochs": 2, "limit_train_batches": 4}, 8)):
        looks = Looks()
        trainer = quiet_trainer(**limits, callbacks=[looks], enable_checkpointing=False, log_every_n_steps=3)
        trainer.fit(ToyModel(), loader())
        assert looks.over == [False] * (batches - 1) + [True]
        assert looks.logged == [(batch + 1) % 3 == 0 for batch in range(batches)]


def test_a_run_that_stops_early_is_over():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 2
            self.over = lightning_port.is_over(trainer)

    stops = Stops()
    quiet_trainer(max_steps=6, callbacks=[stops], enable_checkpointing=False).fit(ToyModel(), loader())
    assert stops.over


def test_fit_can_be_left_without_an_end():
    class Leaves(pl.Callback):
        seen: tuple[str, ...] = ()

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                lightning_port.leave_fit()

        def on_train_end(self, trainer, pl_module):
            self.seen += ("end",)

        def teardown(self, trainer, pl_module, stage):
            self.seen += ("teardown",)

    leaves = Leaves()
    trainer = quiet_trainer(max_steps=6, callbacks=[leaves], enable_checkpointing=False)
    trainer.fit(ToyModel(), loader())
    assert trainer.global_step == 2
    assert leaves.seen == ("teardown",)
