"""What the fit loop takes from its loaders."""

from __future__ import annotations

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


def test_fetches_are_watched_until_the_epoch_ends():
    class Fetches(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((batch_idx, lightning_port.logged_step(trainer)))
            if batch_idx == 0:
                lightning_port.watch_fetches(
                    trainer, lambda: self.seen.append("began"), lambda: self.seen.append("ended")
                )

    fetches = Fetches()
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0, callbacks=[fetches])
    trainer.fit(ToyModel(), loader())
    one_fetch = ["began", "ended"]
    assert fetches.seen == [
        (0, 0), *one_fetch, (1, 1), *one_fetch, (2, 2), (0, 3), *one_fetch, (1, 4), *one_fetch, (2, 5),
    ]  # fmt: skip


def test_the_fit_loops_iterators_are_told_from_those_of_others():
    class Iterated:
        def __init__(self, loader):
            self.loader, self.made = loader, []

        def __iter__(self):
            self.made.append(iter(self.loader))
            return self.made[-1]

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            for each in loaders:
                other = iter(each)
                assert lightning_port.trains_from(trainer, each.made[-2])
                assert not lightning_port.trains_from(trainer, other)
                each.made.pop()

    class Both(ToyModel):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    short = DataLoader(loader().dataset, batch_size=12)  # begins again within an epoch
    loaders = [Iterated(loader()), Iterated(short)]
    trainer = quiet_trainer(max_epochs=2, max_steps=-1, callbacks=[Asks()])
    assert not lightning_port.trains_from(trainer, None)
    trainer.fit(Both(), loaders)
    assert len(loaders[1].made) > len(loaders[0].made) >= 2
