"""``save_last_n_optim_states``: optimizer state in the newest checkpoints only, on real runs.

Of several ranks: see test_sharded.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from helpers.disks import full
from toy import Scored, ToyModel, loader, manifests, names, quiet_trainer

import nemologger as nl
from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.callbacks import EMA
from nemologger.checkpoint.manifest import read
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.verify import problems
from nemologger.disk import LocalDisk
from nemologger.verify import main as verify_main


def life(directory: Path, steps: int, *, model=None, others=(), resume=True, **options):
    """One life of a run that saves every two steps."""
    settings = {"dirpath": directory, "filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1, **options}
    checkpoint = ModelCheckpoint(**settings)
    trainer = quiet_trainer(max_steps=steps, val_check_interval=2, callbacks=[*others, checkpoint])
    if resume:
        nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True).setup(trainer)
    model = model or ToyModel()
    trainer.fit(model, loader(), loader())
    return checkpoint, model


def holders(directory: Path) -> list[int]:
    """The steps of the checkpoints that have optimizer state, ``-last`` included, after a look at every file."""
    found = {path.name: read(path) for path in directory.iterdir() if path.is_dir()}  # a run has a lock there too
    for name, manifest in found.items():
        assert problems(directory / name) == [], name
        saved = load_checkpoint(directory / name)
        assert saved["global_step"] == manifest.step
        assert ("optimizer_states" in saved) is ("lr_schedulers" in saved) is manifest.has_optimizer, name
        assert (directory / name / "context" / "io.json").exists()
    return [m.step for m in sorted(found.values(), key=lambda m: m.step) if m.has_optimizer]


@pytest.mark.parametrize("beside", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("states", "last", "expected"),
    [
        (2, True, [8, 10, 10]),
        (1, "link", [10, 10]),
        (0, False, [10]),
        (9, False, [2, 4, 6, 8, 10]),
        (-1, False, [2, 4, 6, 8, 10]),
    ],
)
def test_the_newest_keep_theirs(tmp_path, states, last, expected, beside):
    checkpoint, _ = life(tmp_path, 10, save_last_n_optim_states=states, save_last=last, async_save=beside)
    assert [name for name in names(tmp_path) if "last" not in name] == [f"step={s}" for s in (10, 2, 4, 6, 8)]
    assert holders(tmp_path) == expected
    assert set(checkpoint.best_k_models) == {str(tmp_path / f"step={step}") for step in range(2, 11, 2)}
    if last == "link":
        assert os.readlink(tmp_path / "step=10-last") == "step=10"


def test_a_run_goes_on_from_what_is_left_and_thins_what_is_old_then(tmp_path, caplog):
    """The first life keeps all states, in files that they share with the model; the second is told to keep one."""
    life(tmp_path / "run", 6, save_last=False)
    assert holders(tmp_path / "run") == [2, 4, 6]
    _, resumed = life(tmp_path / "run", 8, save_last=False, save_last_n_optim_states=1)
    assert holders(tmp_path / "run") == [8]
    with caplog.at_level(logging.WARNING):
        _, again = life(tmp_path / "run", 12, save_last=False, save_last_n_optim_states=2)
    assert holders(tmp_path / "run") == [10, 12]
    _, straight = life(tmp_path / "straight", 12, save_last=False)
    assert again.losses == {step: loss for step, loss in straight.losses.items() if step >= 8}
    assert resumed.losses == {step: loss for step, loss in straight.losses.items() if 6 <= step < 8}
    assert not [record for record in caplog.records if "could not be removed" in record.getMessage()]
    with_state, without = (
        sum(r.size for r in manifests(tmp_path / d)["step=2"].files.values()) for d in ("straight", "run")
    )
    assert without < with_state


def test_the_best_stay_usable_but_are_not_resumed_from(tmp_path, caplog, capsys):
    model = Scored(scores=[0.5, 0.1, 0.5, 0.5, 0.5, 0.5])
    checkpoint, _ = life(tmp_path, 6, model=model, save_top_k=1, save_last_n_optim_states=1, others=[EMA(0.9)])
    # The best is the newest of those that compete, so that it has its state until there is another.
    assert holders(tmp_path) == [2, 6]
    life(tmp_path, 10, model=Scored(scores=[0.5] * 7 + [0.4] * 3), save_top_k=2, save_last_n_optim_states=1)
    assert holders(tmp_path) == [8, 10]
    assert checkpoint.best_model_path == str(tmp_path / "step=2")
    best, module = tmp_path / "step=2", ToyModel()
    nl.load_weights(best, module)
    saved = load_checkpoint(best)["state_dict"]
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in saved.items())
    nl.export_weights(best, tmp_path.parent / f"{tmp_path.name}.pt", ema=True)
    trainer = quiet_trainer(callbacks=[ModelCheckpoint(dirpath=tmp_path)])
    assert trainer.validate(Scored(scores=[0.3]), loader(), ckpt_path=str(best), verbose=False)
    assert nl.verify_checkpoint(best).ok
    assert verify_main([str(best)]) == 0
    assert "(step 2, no optimizer state)" in " ".join(capsys.readouterr().out.split())
    for step in (8, 10):  # none is left that has it
        shutil.rmtree(tmp_path / (f"step={step}" if step == 8 else "step=10-last"))
    with pytest.raises(nl.CheckpointError, match="step=2: it holds no optimizer state"):
        nl.AutoResume(resume_from_directory=tmp_path).setup(quiet_trainer(max_steps=99))


class _FullFor(LocalDisk):
    """Has no room for what takes the place of ``step=2``, for the first two times."""

    def __init__(self) -> None:
        self.refused = 0

    def write(self, path, parts):
        if ".step=2.partial" in str(path) and self.refused < 2:
            self.refused += 1
            raise full()
        super().write(path, parts)


def test_a_full_disk_leaves_the_complete_one_and_the_next_save_tries_again(tmp_path, caplog):
    disk = _FullFor()
    left = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                checkpoint._keeper._remover.wait()
                left.extend(holders(tmp_path))

    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=False, disk=disk,
        save_last_n_optim_states=1,
    )  # fmt: skip
    trainer = quiet_trainer(max_steps=8, val_check_interval=2, callbacks=[Look(), checkpoint])
    with caplog.at_level(logging.WARNING):
        trainer.fit(ToyModel(), loader(), loader())
    assert disk.refused == 2
    assert left == [2, 4]
    assert caplog.text.count("step=2 keeps its optimizer state, which could not be removed: [Errno 28]") == 2
    assert holders(tmp_path) == [8]


def test_averages_stay(tmp_path):
    ema = EMA(0.9)
    life(tmp_path, 4, others=[ema], save_last_n_optim_states=1, save_last=False)
    assert holders(tmp_path) == [4]
    assert (tmp_path / "step=2" / "ema_weights" / ".metadata").exists()
    life(tmp_path / "full", 4, others=[EMA(0.9)], save_last=False)
    for name in ("step=2", "step=4"):
        nl.export_weights(tmp_path / name, tmp_path / "a.pt", ema=True)
        nl.export_weights(tmp_path / "full" / name, tmp_path / "b.pt", ema=True)
        one, other = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_store_is_refused(tmp_path):
    url = "memory://last-n-states/run"
    with pytest.raises(ConfigurationError, match=r"save_last_n_optim_states=2.*an object store renames nothing"):
        ModelCheckpoint(dirpath=url, save_last_n_optim_states=2)
    checkpoint = ModelCheckpoint(save_last_n_optim_states=0)
    trainer = quiet_trainer(max_steps=1, callbacks=[checkpoint])
    checkpoint.dirpath = url  # as NeMoLogger settles it
    with pytest.raises(ConfigurationError, match="an object store renames nothing"):
        trainer.fit(ToyModel(), loader(), loader())


@pytest.mark.parametrize("value", [-2, True, 1.5, None])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ConfigurationError, match="save_last_n_optim_states="):
        ModelCheckpoint(save_last_n_optim_states=value)


def test_what_has_no_effect_is_said(caplog):
    ModelCheckpoint(save_weights_only=True, save_last_n_optim_states=1)
    assert "save_last_n_optim_states=1) has no effect with save_weights_only=True" in caplog.text
