"""A checkpoint to resume from is for one fit, which trains."""

from __future__ import annotations

from contextlib import suppress

import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyModel, quiet_trainer

import nemologger as nl


class Stop(Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            raise KeyError


def program(directory, *callbacks, validate=False):
    """Three times one epoch more, by the same trainer; returns what it has trained on."""
    model = ToyModel()
    data = DataLoader(ToyData(), batch_size=BATCH, shuffle=True)
    ckpt = nl.ModelCheckpoint(dirpath=directory, monitor=None, every_n_train_steps=4)
    options = {"max_epochs": 1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    trainer = quiet_trainer(callbacks=[*callbacks, ckpt], **options)
    resume = nl.AutoResume(resume_from_directory=directory, resume_if_exists=True, resume_ignore_no_checkpoint=True)
    resume.setup(trainer, model)
    with suppress(KeyError):
        for epochs in (1, 2, 3):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(model, data, DataLoader(ToyData(), batch_size=BATCH))
            if validate:
                trainer.validate(model, DataLoader(ToyData(), batch_size=BATCH), verbose=False)
    return model.losses


@pytest.mark.parametrize(("after", "validate"), [(6, False), (15, True), (27, True)])
def test_a_program_that_raises_max_epochs_goes_on_in_the_fit_that_has_something_to_train(tmp_path, after, validate):
    straight = program(tmp_path / "straight", validate=validate)
    assert len(straight) == 30
    assert len(program(tmp_path / "run", Stop(after), validate=validate)) == after
    rest = program(tmp_path / "run", validate=validate)
    assert rest == {step: loss for step, loss in straight.items() if step >= 4 * (after // 4)}
    assert not program(tmp_path / "run", validate=validate)  # all is done
