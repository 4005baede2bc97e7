"""ModelCheckpoint from one fit to the next: the same object again, the same directory from scratch, a step back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_model_checkpoint import _StopAt, _StoppedError, run
from toy import ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ModelCheckpoint, load_weights
from nemologger.disk import LocalDisk


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model."""
    model = ToyModel()
    load_weights(directory, model)
    return model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# --- one object, several fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True], ids=["sync", "async"])
def test_one_object_saves_the_runs_of_several_trainers(tmp_path, beside):
    """A cell of a notebook that is run twice: what is on disk then is of the second run."""
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=1, async_save=beside
    )
    trained = []
    for seed in range(2):
        model = ToyModel()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.net[0].weight)
        quiet_trainer(max_steps=4, callbacks=[ckpt]).fit(model, loader())
        trained.append(model.state_dict())
    assert not same(*trained)
    assert names(tmp_path) == ["step=4", "step=4-last"]
    assert same(weights(tmp_path / "step=4"), trained[1])
    assert same(weights(tmp_path / "step=4-last"), trained[1])
    assert {m.consumed_samples for m in manifests(tmp_path).values()} == {16}


def test_a_fresh_run_knows_nothing_of_the_one_that_the_object_has_resumed_before(tmp_path):
    first, _ = run(tmp_path / "first", 10, every_n_train_steps=2)
    ckpt = ModelCheckpoint(dirpath=tmp_path / "second", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    resumed = quiet_trainer(max_steps=11, callbacks=[ckpt])
    resumed.fit(ToyModel(), loader(), loader(), ckpt_path=first.last_model_path)
    assert ckpt.consumed_samples == 44
    shutil.rmtree(tmp_path / "second")
    quiet_trainer(max_steps=6, val_check_interval=5, callbacks=[ckpt]).fit(ToyModel(), loader(), loader())
    saved = {m.step: m for m in manifests(tmp_path / "second").values()}
    # Validation runs after five steps: before that there is nothing to compare by.
    assert {step: m.consumed_samples for step, m in saved.items()} == {6: 24}


def test_the_same_trainer_goes_on_counting(tmp_path):
    ckpt = ModelCheckpoint(monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(max_steps=4, callbacks=[ckpt])
    model = ToyModel()
    trainer.fit(model, loader())
    written = (tmp_path / "step=4" / "manifest.json").stat().st_mtime_ns
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, loader())
    assert {m.step: m.consumed_samples for m in manifests(tmp_path).values()} == {2: 8, 4: 16, 6: 24}
    assert (tmp_path / "step=4" / "manifest.json").stat().st_mtime_ns == written


class _FullDisk(LocalDisk):
    """Has no space for ``step=2``."""

    def write(self, path, parts):
        if path.suffix == ".distcp" and path.parent.parent.name.startswith("step=2"):
            raise OSError(28, "No space left on device", str(path))
        super().write(path, parts)


def test_failed_saves_of_the_run_before_are_not_counted(tmp_path):
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, max_failed_saves=2, disk=_FullDisk()
    )
    for _ in range(2):
        trainer = quiet_trainer(max_steps=9, callbacks=[_StopAt(3), ckpt])
        with pytest.raises(_StoppedError):
            trainer.fit(ToyModel(), loader())
        assert trainer.global_step == 3
