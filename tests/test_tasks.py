"""train, pretrain, finetune, validate: one call for a run."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import fiddle as fdl
import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from toy import ToyData, ToyDataModule, ToyModel, names, quiet_trainer

import nemologger as nl
from nemologger.checkpoint.reading.load import load_model


def _log(root: Path, **checkpoint) -> nl.NeMoLogger:
    return nl.NeMoLogger(
        name="toy", log_dir=root, ckpt=nl.ModelCheckpoint(filename="{step}", every_n_train_steps=5, **checkpoint)
    )


def _resume(**options) -> nl.AutoResume:
    return nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True, **options)


def test_it_trains_and_returns_the_experiments_directory(tmp_path):
    trainer = quiet_trainer(max_steps=5)
    assert nl.train(ToyModel(), ToyDataModule(), trainer, _log(tmp_path), _resume()) == tmp_path
    run = nl.run_of(trainer)
    assert run is not None
    assert run.log_dir == tmp_path / "toy"
    assert names(run.checkpoint_dir) == ["step=5", "step=5-last"]


def test_again_with_more_steps_goes_on_and_with_the_same_does_nothing(tmp_path, caplog):
    losses = []
    for steps in (5, 10, 10):
        model = ToyModel()
        nl.train(model, ToyDataModule(), quiet_trainer(max_steps=steps), _log(tmp_path), _resume())
        losses.append(sorted(model.losses))
    assert losses == [list(range(5)), list(range(5, 10)), []]
    assert "nothing is left to train" in caplog.text


def test_a_plain_lightning_trainer_works_and_says_once_what_its_context_lacks(tmp_path, caplog):
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10, max_epochs=-1, val_check_interval=5, check_val_every_n_epoch=None, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        nl.train(ToyModel(width=4), ToyDataModule(), trainer, _log(tmp_path), _resume())
    said = [str(w.message) for w in warned if "nemologger.Trainer" in str(w.message)]
    said += [record.getMessage() for record in caplog.records if "nemologger.Trainer" in record.getMessage()]
    assert len(said) == 1
    model = nl.io.load_context(tmp_path / "toy" / "checkpoints" / "step=10-last", subpath="model")
    assert isinstance(model, ToyModel)
    assert model.hparams["width"] == 4


def test_a_model_may_be_a_checkpoint(tmp_path):
    nl.train(ToyModel(width=4), ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path / "a"), _resume())
    checkpoint = tmp_path / "a" / "toy" / "checkpoints" / "step=5"
    trainer = quiet_trainer(max_steps=1, val_check_interval=1)
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen["width"] = pl_module.net[0].weight.shape[0]
            seen["weight"] = pl_module.net[0].weight.detach().clone()

    trainer.callbacks.append(Look())
    nl.train(checkpoint, ToyDataModule(), trainer, _log(tmp_path / "b"), _resume())
    assert seen["width"] == 4
    assert torch.equal(seen["weight"], load_model(checkpoint)["net.0.weight"])


def test_so_it_may_with_a_checkpoint_to_start_from(tmp_path):
    nl.train(ToyModel(width=4), ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path / "a"), _resume())
    checkpoint = tmp_path / "a" / "toy" / "checkpoints" / "step=5"
    trainer = quiet_trainer(max_steps=8)
    nl.train(checkpoint, ToyDataModule(), trainer, _log(tmp_path / "b"), _resume(start_from=checkpoint))
    assert sorted(trainer.lightning_module.losses) == [5, 6, 7]  # goes on, optimizer and all


class _ResumeIn(nl.AutoResume):
    """One with an argument of its own, as a program may have it."""

    def __init__(self, root: Path) -> None:
        super().__init__(resume_from_directory=root / "found", resume_ignore_no_checkpoint=True)


def test_so_it_may_with_an_own_kind_of_resume(tmp_path):
    nl.train(ToyModel(width=4), ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path / "a"), _resume())
    checkpoint = tmp_path / "a" / "toy" / "checkpoints" / "step=5"
    resume, trainer = _ResumeIn(tmp_path), quiet_trainer(max_steps=0)
    nl.train(checkpoint, ToyDataModule(), trainer, _log(tmp_path / "b"), resume)
    assert torch.equal(trainer.lightning_module.net[0].weight, load_model(checkpoint)["net.0.weight"])
    assert resume.restore_config is None


class _Sgd:
    """An optimizer module, as NeMo has them."""

    def connect(self, model):
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.5)


@pytest.mark.parametrize("optim", [_Sgd(), functools.partial(torch.optim.SGD, lr=0.5)], ids=["connects", "callable"])
def test_the_optimizer_can_be_given(tmp_path, optim):
    trainer = quiet_trainer(max_steps=1, val_check_interval=1)
    nl.train(ToyModel(), ToyDataModule(), trainer, _log(tmp_path), optim=optim)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_what_is_no_optimizer_is_refused(tmp_path):
    with pytest.raises(nl.ConfigurationError, match=r"connect\(model\).*functools.partial"):
        nl.train(ToyModel(), ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path), optim=0.1)
    assert not any(tmp_path.iterdir()), "an earlier run's log files would have moved"


class _Tokenizer(nl.io.IOMixin):
    def __init__(self, size: int = 1) -> None:
        self.size = size


class _Reads(ToyModel):
    tokenizer: object = None


def test_model_and_data_share_a_tokenizer(tmp_path):
    data, model = ToyDataModule(), _Reads()
    data.tokenizer = _Tokenizer(3)
    nl.pretrain(model, data, quiet_trainer(max_steps=5), _log(tmp_path / "a"))
    assert model.tokenizer is data.tokenizer
    other = ToyDataModule()
    nl.finetune(model, other, quiet_trainer(max_steps=5), _log(tmp_path / "b"))
    assert other.tokenizer is model.tokenizer
    with pytest.raises(nl.ConfigurationError, match="has no tokenizer"):
        nl.train(model, ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path / "c"), tokenizer="data")
    with pytest.raises(nl.ConfigurationError, match='"model", "data"'):
        nl.train(model, other, quiet_trainer(max_steps=5), _log(tmp_path / "d"), tokenizer="both")


def test_the_model_is_transformed_once_before_training_also_on_a_resume(tmp_path):
    calls = []

    def freeze(model):
        calls.append(model)
        model.net[0].weight.requires_grad_(False)

    before = ToyModel().net[0].weight.detach().clone()
    for steps in (5, 10):
        model = ToyModel()
        nl.train(
            model, ToyDataModule(), quiet_trainer(max_steps=steps), _log(tmp_path), _resume(), model_transform=freeze
        )  # fmt: skip
        assert torch.equal(model.net[0].weight, before)
    assert len(calls) == 2
    with pytest.raises(nl.ConfigurationError, match="in place"):
        nl.train(ToyModel(), ToyDataModule(), quiet_trainer(max_steps=5), model_transform=lambda m: torch.nn.Linear(1, 1),
                 log=_log(tmp_path / "x"))  # fmt: skip


def test_validate_uses_the_checkpoint(tmp_path):
    trainer = quiet_trainer(max_steps=5)
    nl.train(ToyModel(), ToyDataModule(), trainer, _log(tmp_path), _resume())
    best = trainer.checkpoint_callback.best_model_score.item()
    fresh = quiet_trainer(max_steps=5)
    assert nl.validate(ToyModel(), ToyDataModule(), fresh, _log(tmp_path), _resume()) == tmp_path
    assert fresh.callback_metrics["val_loss"].item() == pytest.approx(best)


def test_fabric_is_refused(tmp_path):
    for task in (nl.train, nl.validate):
        with pytest.raises(nl.ConfigurationError, match="Fabric"):
            task(ToyModel(), ToyDataModule(), Fabric(accelerator="cpu"), _log(tmp_path))


def test_a_fiddle_recipe_builds_runs_and_is_kept(tmp_path):
    recipe = fdl.Partial(
        nl.train,
        model=fdl.Config(ToyModel, width=4),
        data=fdl.Config(ToyDataModule),
        trainer=fdl.Config(
            nl.Trainer, accelerator="cpu", max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        ),
        log=nl.default_log(dir=str(tmp_path), name="toy", every_n_train_steps=2, save_top_k=1),
        resume=nl.default_resume(),
    )  # fmt: skip
    assert fdl.build(recipe)(task_config=recipe) == tmp_path
    kept = json.loads((tmp_path / "toy" / "task.json").read_text())
    assert "objects" in kept
    last = next((tmp_path / "toy" / "checkpoints").glob("*-last"))
    assert "consumed_samples=16" in last.name
    assert last.name.startswith("ToyModel--val_loss=")
    assert isinstance(nl.io.load_context(last, subpath="model"), ToyModel)


class _Adapter(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.extra = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.extra(x)


def _add_adapter(model: ToyModel) -> None:
    model.net = _Adapter(model.net)


def test_adapters_are_added_to_the_weights_of_another_run_and_resumed_with_them(tmp_path):
    nl.train(ToyModel(), ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path / "base"), _resume())
    base = tmp_path / "base" / "toy" / "checkpoints" / "step=5"
    resume = _resume(restore_config=nl.RestoreConfig(path=str(base)))
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.net.inner[0].weight.detach().clone())

    for steps in (5, 10):
        trainer = quiet_trainer(max_steps=steps, callbacks=[Look()])
        nl.finetune(ToyModel(), ToyDataModule(), trainer, _log(tmp_path / "tuned"), resume, peft=_add_adapter)
    assert torch.equal(seen[0], load_model(base)["net.0.weight"])
    tuned = tmp_path / "tuned" / "toy" / "checkpoints" / "step=5"
    assert torch.equal(seen[1], load_model(tuned)["net.inner.0.weight"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resume": True}, "resume is a bool: expected an AutoResume"),
        ({"log": "runs"}, "log is a str: expected a NeMoLogger"),
        ({"trainer": pl.Trainer}, "expected a lightning.pytorch.Trainer"),
        ({"model": 3}, "model is a int: expected a LightningModule"),
        ({"model": ToyModel}, "model is the class ToyModel itself, not an object of it: expected a LightningModule"),
        (
            {"model": pytorch_lightning.LightningModule()},
            "of the package pytorch_lightning .use `import lightning.pytorch",
        ),
        ({"data": pytorch_lightning.LightningDataModule()}, "data is a .* of the package pytorch_lightning"),
        ({"data": functools.partial(ToyDataModule)}, "data is a partial: expected .* a DataLoader"),
        ({"data": torch.utils.data.DataLoader}, "data is the class DataLoader itself"),
        ({"trainer": quiet_trainer(callbacks=[pl.Callback])}, "one is the class Callback itself, not an object of it"),
        ({"model_transform": "lora"}, r"model_transform \(peft\) is a str: expected a function of the model"),
        (
            {"data": "train.csv"},
            r"data is a str: expected .* a DataLoader, for example torch\.utils\.data\.DataLoader\(data",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments, named):
    given = {"model": ToyModel(), "data": ToyDataModule(), "trainer": quiet_trainer(max_steps=5), **arguments}
    with pytest.raises(nl.ConfigurationError, match=named):
        nl.train(**given)


class Batches(ToyData):
    """Its samples are batches, and it ends by itself."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= len(self):
            raise IndexError
        return torch.stack([super(Batches, self).__getitem__(4 * index + i) for i in range(4)])


def test_a_dataset_of_batches_is_a_loader_but_that_is_said(tmp_path, caplog):
    model, log = ToyModel(), nl.NeMoLogger(log_dir=str(tmp_path), ckpt=nl.ModelCheckpoint(monitor=None))
    nl.train(model, Batches(), quiet_trainer(max_steps=6), log=log)
    assert len(model.losses) == 6
    assert caplog.text.count("data is a Batches, no DataLoader: each of its samples is taken for a batch") == 1


def test_a_finished_run_leaves_its_weights_in_the_model(tmp_path):
    for _ in range(2):
        model = ToyModel()
        nl.train(model, ToyDataModule(), quiet_trainer(max_steps=5), _log(tmp_path), _resume())
    expected = load_model(tmp_path / "toy" / "checkpoints" / "step=5-last")
    assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("monitor", "is_told"), [("val_los", True), ("vall_loss", True), ("val_loss", False), ("train_loss", False)]
)
def test_a_metric_that_validation_does_not_log_is_told_before_training(tmp_path, caplog, monitor, is_told):
    model, ckpt = ToyModel(), nl.ModelCheckpoint(monitor=monitor, every_n_train_steps=2)
    told = []
    model.on_train_start = lambda: told.append(
        "validation was tried before training, and logged ['val_loss']" in caplog.text
    )
    trainer = quiet_trainer(max_steps=2, val_check_interval=2, num_sanity_val_steps=2)
    with nullcontext() if not is_told else pytest.raises(nl.ConfigurationError, match="no such metric was logged"):
        nl.train(model, ToyDataModule(), trainer, nl.NeMoLogger(name="toy", log_dir=tmp_path, ckpt=ckpt))
    assert told == [is_told]


class Silent(ToyModel):
    """Logs nothing: not every torch can compile what that does."""

    def training_step(self, batch, batch_idx):
        self.losses[self.global_step] = 0.0
        return self.net(batch).mean()


def test_a_compiled_module_is_trained_and_resumed(tmp_path):
    for steps in (5, 10):
        model = torch.compile(Silent(), backend="eager")
        trainer = quiet_trainer(max_steps=steps, limit_val_batches=0)
        nl.train(model, ToyDataModule(), trainer, _log(tmp_path, monitor=None), _resume())
    assert sorted(model._orig_mod.losses) == [5, 6, 7, 8, 9]


def test_a_trainer_that_has_trained_before_goes_on_from_the_end_of_an_epoch(tmp_path):
    trainer, log = quiet_trainer(max_epochs=1, check_val_every_n_epoch=1, val_check_interval=1.0), _log(tmp_path)
    for epochs in (1, 2):
        model = ToyModel()
        trainer.fit_loop.max_epochs = epochs
        nl.train(model, ToyDataModule(), trainer, log, _resume())
    assert sorted(model.losses) == list(range(10, 20))
