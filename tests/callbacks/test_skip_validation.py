"""What runs between a resume and the first training step: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from toy import quiet_trainer
from train_toy import Forgetful, Shuffled

import nemologger as nl
from nemologger.callbacks import SkipValidationOnResume

MID_EPOCH = {"max_steps": 8, "val_check_interval": 4}
EPOCHS = {"max_epochs": 2, "max_steps": -1, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
OPTIONS = {"limit_val_batches": 3, "limit_train_batches": 4, "num_sanity_val_steps": 2}


class Trace(Callback):
    """What happens, in order; losses too."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.events.append("train")
        self.losses.append(outputs["loss"].item())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.events.append("sanity" if trainer.sanity_checking else "validate")


class Fails(Forgetful):
    """Raises in the middle of the first validation."""

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and batch_idx == 1:
            raise KeyError("in the middle of validation")


def fit(directory: Path, options, *callbacks, resume: Path | None = None, model=Forgetful, **ckpt) -> Trace:
    trace = Trace()
    settings = {"dirpath": directory, "filename": "{step}", "monitor": None, "save_top_k": -1, "verbose": False}
    checkpoint = nl.ModelCheckpoint(**{**settings, "every_n_train_steps": 1000, **ckpt})
    trainer = quiet_trainer(**OPTIONS, **options, callbacks=[trace, *callbacks, checkpoint])
    trainer.fit(model(), Shuffled(), ckpt_path=resume)
    assert trainer.num_sanity_val_steps == 2
    return trace


@pytest.mark.parametrize("callbacks", [[], [SkipValidationOnResume()]])
@pytest.mark.parametrize(
    ("options", "ckpt"),
    [
        (MID_EPOCH, {"every_n_train_steps": 4}),
        (EPOCHS, {"every_n_train_steps": 4}),
        (EPOCHS, {"every_n_train_steps": None, "every_n_epochs": 1}),
    ],
)
def test_a_validation_at_the_checkpoint_is_not_repeated(tmp_path, options, ckpt, callbacks):
    straight = fit(tmp_path / "straight", options, *callbacks, **ckpt)
    assert straight.events == ["sanity"] * 2 + (["train"] * 4 + ["validate"] * 3) * 2
    resumed = fit(tmp_path / "on", options, *callbacks, resume=tmp_path / "straight" / "step=4", **ckpt)
    assert resumed.events == ["train"] * 4 + ["validate"] * 3
    assert resumed.losses == straight.losses[4:]


def test_there_is_no_sanity_check_at_the_end_of_an_epoch(tmp_path):
    ckpt = {"every_n_train_steps": None, "every_n_epochs": 1, "save_on_train_epoch_end": True}
    straight = fit(tmp_path / "straight", EPOCHS, **ckpt)
    saved = tmp_path / "straight" / "step=4"
    lightnings = fit(tmp_path / "lightning", EPOCHS, resume=saved, **ckpt)
    skipping = fit(tmp_path / "skipping", EPOCHS, SkipValidationOnResume(), resume=saved, **ckpt)
    assert lightnings.events == ["sanity"] * 2 + ["train"] * 4 + ["validate"] * 3
    assert skipping.events == ["train"] * 4 + ["validate"] * 3
    assert skipping.losses == lightnings.losses == straight.losses[4:]


@pytest.mark.parametrize("options", [MID_EPOCH, EPOCHS])
def test_the_rest_of_an_interrupted_validation_is_left_out(tmp_path, options):
    with pytest.raises(KeyError, match="in the middle of validation"):
        fit(tmp_path, options, model=Fails, save_on_exception=True)
    saved = tmp_path / "step=4"
    anew = fit(tmp_path / "anew", options, resume=saved)
    skipping = fit(tmp_path / "skipping", options, SkipValidationOnResume(), resume=saved)
    assert anew.events == ["validate"] * 3 + ["train"] * 4 + ["validate"] * 3
    assert skipping.events == ["train"] * 4 + ["validate"] * 3
    assert skipping.losses == anew.losses
    assert skipping.losses == fit(tmp_path / "straight", options).losses[4:]


def test_a_run_that_starts_from_scratch_has_its_sanity_check(tmp_path):
    assert fit(tmp_path, MID_EPOCH, SkipValidationOnResume()).events[:3] == ["sanity", "sanity", "train"]


def test_a_resume_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    class Refuses(Callback):
        def on_fit_start(self, trainer, pl_module):
            assert trainer.num_sanity_val_steps == 0
            raise KeyError("not today")

    fit(tmp_path, MID_EPOCH)
    callbacks = [SkipValidationOnResume(), Refuses(), nl.ModelCheckpoint(dirpath=tmp_path, monitor=None)]
    trainer = quiet_trainer(**OPTIONS, **MID_EPOCH, callbacks=callbacks)
    with pytest.raises(KeyError, match="not today"):
        trainer.fit(Forgetful(), Shuffled(), ckpt_path=tmp_path / "step=8")
    assert trainer.num_sanity_val_steps == 2
