from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint
from helpers.sections import bare_trainer, checkpoints, ckpt, fit
from omegaconf import OmegaConf
from toy import ToyModel

from nemologger.errors import CheckpointError, NotFoundError, RefusedError, RunCompletedError
from nemologger.exp_manager import exp_manager
from nemologger.run.record import close_log


class WithConfig(ToyModel):
    """Its hyperparameters are a configuration object, as those of NeMo 1's models."""

    def __init__(self) -> None:
        super().__init__()
        self._hparams = OmegaConf.create({"cfg": {"lr": 0.1, "layers": [1, 2], "name": "${.lr}", "none": None}})
        self._hparams_name = "cfg"


def run(tmp_path: Path, steps: int, model: ToyModel | None = None, params=None, **keys):
    """Train to ``steps`` with checkpoints every five."""
    trainer = bare_trainer(max_steps=steps)
    section = {**ckpt(every_n_train_steps=5, **(params or {})), "exp_dir": tmp_path, **keys}
    log_dir = exp_manager(trainer, section)
    started_at = trainer.ckpt_path
    model = fit(trainer, model)
    return log_dir, started_at, model


def nemo_1_checkpoint(path: Path, steps: int = 5, model: ToyModel | None = None) -> Path:
    """A checkpoint file, as Lightning writes it for NeMo 1."""
    trainer = bare_trainer(max_steps=steps)
    trainer.fit(model or WithConfig(), datamodule=None, train_dataloaders=_loader(), val_dataloaders=_loader())
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path)
    return path


def _loader():
    from toy import loader

    return loader()


RESUME = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True}


def test_resume_if_exists_goes_on_where_the_run_was(tmp_path):
    first, started_at, _ = run(tmp_path, 5, **RESUME)
    assert started_at is None
    second, started_at, model = run(tmp_path, 10, **RESUME)
    assert second == first == tmp_path / "default"
    assert Path(started_at).parent == first / "checkpoints"
    assert min(model.losses) == 5
    _, _, whole = run(tmp_path / "other", 10, **RESUME)
    assert model.losses == {step: loss for step, loss in whole.losses.items() if step >= 5}


def test_without_it_every_run_is_a_new_one(tmp_path):
    first, _, _ = run(tmp_path, 5, version="a")
    second, started_at, model = run(tmp_path, 5, version="b")
    assert first != second
    assert started_at is None
    assert min(model.losses) == 0


def test_no_checkpoint_is_an_error_unless_it_may_be_ignored(tmp_path, caplog):
    with pytest.raises(NotFoundError, match="resume_ignore_no_checkpoint"):
        run(tmp_path, 5, resume_if_exists=True)
    _, _, model = run(tmp_path, 5, **RESUME)
    assert "training starts from scratch" in caplog.text
    assert min(model.losses) == 0


def test_the_directory_of_the_checkpoints_is_looked_into(tmp_path):
    elsewhere = {"dirpath": str(tmp_path / "elsewhere")}
    run(tmp_path, 5, params=elsewhere, **RESUME)
    assert not (tmp_path / "default" / "checkpoints").exists()
    _, started_at, _ = run(tmp_path, 10, params=elsewhere, **RESUME)
    assert Path(started_at).parent == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["conformer--last.ckpt", "conformer--val_loss=1.0000-epoch=0-last.ckpt"])
def test_checkpoints_of_nemo_1_are_resumed_from(tmp_path, name):
    nemo_1_checkpoint(tmp_path / "default" / "checkpoints" / name)
    nemo_1_checkpoint(tmp_path / "default" / "checkpoints" / "conformer--val_loss=0.5000-epoch=0.ckpt", steps=2)
    _, started_at, model = run(tmp_path, 10, model=WithConfig(), **RESUME)
    assert Path(started_at).name == name
    assert min(model.losses) == 5
    # The next start goes on from what this one has saved.
    _, started_at, model = run(tmp_path, 15, model=WithConfig(), **RESUME)
    assert Path(started_at).name.endswith("-step=10-last")
    assert min(model.losses) == 10


def test_checkpoints_of_nemo_1_whose_names_have_a_slash(tmp_path):
    """Lightning makes a directory ``n--val`` for the metric ``val/loss``; NeMo 1 finds them there."""
    directory = tmp_path / "default" / "checkpoints" / "n--val"
    nemo_1_checkpoint(directory / "loss=0.5000-epoch=0.ckpt", steps=2)
    last = nemo_1_checkpoint(directory / "loss=1.0000-epoch=0-last.ckpt")
    _, started_at, model = run(tmp_path, 10, model=WithConfig(), **RESUME)
    assert started_at == str(last)
    assert min(model.losses) == 5
    _, started_at, model = run(tmp_path, 15, model=WithConfig(), **RESUME)
    assert Path(started_at).parent == tmp_path / "default" / "checkpoints"
    assert min(model.losses) == 10


def test_distributed_checkpoints_of_nemo_1_are_no_empty_directory(tmp_path):
    """A directory of weights, without NeMo 2's ``weights/`` in it."""
    content = torch.load(nemo_1_checkpoint(tmp_path / "a.ckpt", model=ToyModel()), weights_only=False)
    last = tmp_path / "default" / "checkpoints" / "gpt--val_loss=1.00-step=5-last"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process
        torch.distributed.checkpoint.save({"state_dict": content.pop("state_dict")}, checkpoint_id=last)
    torch.save(content, last / "common.pt")
    _, started_at, model = run(tmp_path, 10, **RESUME)
    assert started_at == str(last)
    assert min(model.losses) == 5


def test_an_end_checkpoint_says_that_the_run_has_completed(tmp_path):
    end = nemo_1_checkpoint(tmp_path / "default" / "checkpoints" / "conformer--end.ckpt")
    with pytest.raises(RunCompletedError, match="resume_past_end"):
        run(tmp_path, 10, model=WithConfig(), **RESUME)
    _, started_at, model = run(tmp_path, 10, model=WithConfig(), resume_past_end=True, **RESUME)
    assert started_at == str(end)
    assert min(model.losses) == 5


def test_resume_past_end_alone_has_no_effect(tmp_path, caplog):
    run(tmp_path, 5, resume_past_end=True)
    assert "exp_manager.resume_past_end has no effect without resume_if_exists" in caplog.text


@pytest.mark.parametrize("ours", [True, False])
def test_resume_from_checkpoint_starts_a_new_run_there(tmp_path, ours):
    if ours:
        source = next((run(tmp_path / "base", 5, version="v")[0] / "checkpoints").glob("*-last"))
    else:
        source = nemo_1_checkpoint(tmp_path / "base" / "any name.ckpt", model=ToyModel())
    log_dir, started_at, model = run(tmp_path, 10, version="v", resume_from_checkpoint=str(source))
    assert started_at == str(source)
    assert min(model.losses) == 5
    assert source.exists()
    assert checkpoints(log_dir)


def test_resume_from_checkpoint_is_where_a_chain_of_jobs_starts(tmp_path):
    source = nemo_1_checkpoint(tmp_path / "base.ckpt", model=ToyModel())
    chain = {**RESUME, "resume_from_checkpoint": str(source)}
    _, started_at, model = run(tmp_path, 10, **chain)
    assert started_at == str(source)
    assert min(model.losses) == 5
    _, started_at, model = run(tmp_path, 15, **chain)
    assert Path(started_at).parent == tmp_path / "default" / "checkpoints"
    assert min(model.losses) == 10


def test_resume_from_checkpoint_without_leave_to_start(tmp_path, caplog):
    source = nemo_1_checkpoint(tmp_path / "base.ckpt", model=ToyModel())
    with pytest.raises(NotFoundError):
        run(tmp_path, 10, resume_if_exists=True, resume_from_checkpoint=str(source))
    run(tmp_path, 5, **RESUME)
    _, started_at, _ = run(tmp_path, 10, resume_if_exists=True, resume_from_checkpoint=str(source))
    assert Path(started_at).parent == tmp_path / "default" / "checkpoints"
    assert "exp_manager.resume_from_checkpoint has no effect beside resume_if_exists" in caplog.text


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NotFoundError, match=r"there is no checkpoint at .*gone\.ckpt"):
        run(tmp_path, 5, resume_from_checkpoint=str(tmp_path / "gone.ckpt"))


def test_a_configuration_object_in_a_file_is_read_and_code_is_not(tmp_path):
    """What NeMo 1 saves is OmegaConf's; anything else that is not plain is refused as before."""

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    good = nemo_1_checkpoint(tmp_path / "good.ckpt")
    content = torch.load(good, weights_only=False)
    assert type(content["hyper_parameters"]).__name__ == "DictConfig"
    torch.save({**content, "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(RefusedError):
        run(tmp_path, 10, model=WithConfig(), resume_from_checkpoint=str(tmp_path / "evil.ckpt"))
    _, _, model = run(tmp_path, 10, model=WithConfig(), resume_from_checkpoint=str(good))
    assert min(model.losses) == 5


def test_averaged_weights_of_nemo_1_are_nothing_to_go_on_from(tmp_path):
    directory = tmp_path / "default" / "checkpoints"
    nemo_1_checkpoint(directory / "n--val_loss=1.0-epoch=0.ckpt")
    nemo_1_checkpoint(directory / "n--val_loss=1.0-epoch=0-EMA.ckpt", steps=7)
    _, started_at, _ = run(tmp_path, 10, model=WithConfig(), **RESUME)
    assert Path(started_at).name == "n--val_loss=1.0-epoch=0.ckpt"


def test_checkpoints_in_parts_are_not_an_empty_directory(tmp_path):
    nemo_1_checkpoint(tmp_path / "default" / "checkpoints" / "mp_rank_00" / "n--last.ckpt")
    with pytest.raises(CheckpointError, match=r"split over ranks \(mp_rank_00/n--last\.ckpt\)"):
        run(tmp_path, 10, **RESUME)


def test_what_another_trainer_saved_beside_is_no_obstacle(tmp_path):
    trainer = bare_trainer()
    run_dir = exp_manager(trainer, {**ckpt(), "exp_dir": tmp_path, **RESUME})
    close_log(trainer)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "notes.txt").write_text("hello")
    assert isinstance(trainer, pl.Trainer)
    _, started_at, _ = run(tmp_path, 5, **RESUME)
    assert started_at is None
