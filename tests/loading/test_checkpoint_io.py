"""What ``fit(ckpt_path=...)`` and its like load."""

from __future__ import annotations

import re
import shutil

import lightning.pytorch as pl
import pytest
import torch
from toy import ToyModel, loader, quiet_trainer

from nemologger import (
    AutoResume,
    CheckpointError,
    DamagedCheckpointError,
    ModelCheckpoint,
    ModelMismatchError,
    NotFoundError,
    RefusedError,
    load_weights,
)
from nemologger.checkpoint.reading.load import load_model
from nemologger.loading.checkpoint_io import DirectoryCheckpointIO, install
from nemologger.loading.compare import check_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    saves = ModelCheckpoint(dirpath=directory, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(ToyModel(), loader(), loader())
    return directory / "x"


def _trainer(**options):
    trainer = quiet_trainer(max_steps=7, **options)
    install(trainer)
    return trainer


def test_installing_twice_changes_nothing():
    trainer = _trainer()
    first = trainer.strategy.checkpoint_io
    install(trainer)
    assert trainer.strategy.checkpoint_io is first
    assert isinstance(first, DirectoryCheckpointIO)


@pytest.mark.parametrize("where", ["", "weights"])
def test_fit_goes_on_from_a_directory(checkpoint, where):
    model = ToyModel()
    _trainer().fit(model, loader(), loader(), ckpt_path=str(checkpoint / where))
    assert sorted(model.losses) == [5, 6]


def test_files_of_lightning_are_read_and_written_as_before(tmp_path):
    trainer = _trainer(val_check_interval=1)
    model = ToyModel()
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["global_step"] == 7
    other = ToyModel()
    trainer = quiet_trainer(max_steps=9)
    install(trainer)
    trainer.fit(other, loader(), loader(), ckpt_path=str(tmp_path / "x.ckpt"))
    assert sorted(other.losses) == [7, 8]


@pytest.mark.parametrize("file", ["__0_0.distcp", "__0_1.distcp", "common.pt", ".metadata"])
@pytest.mark.parametrize("task", ["fit", "validate"])
def test_damage_is_found_without_being_looked_for(checkpoint, tmp_path, task, file):
    path = shutil.copytree(checkpoint, tmp_path / "x") / "weights" / file
    content = bytearray(path.read_bytes())
    for at in range(100, len(content), 64):
        content[at] ^= 16
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=re.escape(file)):
        getattr(_trainer(), task)(ToyModel(), loader(), ckpt_path=str(tmp_path / "x"))


def test_nothing_there_is_an_error():
    with pytest.raises(NotFoundError, match="no checkpoint at /nowhere"):
        _trainer().fit(ToyModel(), loader(), loader(), ckpt_path="/nowhere/x")


def test_another_model_is_refused_before_anything_is_loaded(checkpoint):
    class Other(ToyModel):
        def __init__(self):
            super().__init__(width=16)
            self.extra = torch.nn.Linear(2, 2)

    model = Other()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelMismatchError) as error:
        _trainer().fit(model, loader(), loader(), ckpt_path=str(checkpoint))
    message = str(error.value)
    assert "missing in the checkpoint: extra.weight (2, 2)" in message
    assert "net.0.weight is (8, 8) in the checkpoint, (16, 8) in the model" in message
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_migrates_its_own_keys_is_left_to_do_so(checkpoint):
    class Renamed(ToyModel):
        def __init__(self):
            super().__init__()
            self.body = self.net
            del self.net

        def training_step(self, batch, batch_idx):
            return self.body(batch).pow(2).mean()

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.body(batch).mean())

        def on_load_checkpoint(self, state):
            state["state_dict"] = {key.replace("net.", "body."): value for key, value in state["state_dict"].items()}

    trainer = _trainer()
    trainer.fit(Renamed(), loader(), loader(), ckpt_path=str(checkpoint))
    assert trainer.global_step == 7


class _Renamed(torch.nn.Module):
    """A linear layer that has its parameters under other names than before, and takes the earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module, state, prefix, *rest):
        for name in ("weight", "bias"):
            state[f"{prefix}inner.{name}"] = state.pop(f"{prefix}{name}")

    def forward(self, x):
        return self.inner(x)


class _Grows(torch.nn.Linear):
    """Takes a weight of any size."""

    def __init__(self) -> None:
        super().__init__(8, 2)

    def _load_from_state_dict(self, state, prefix, *rest):
        for name in ("weight", "bias"):
            setattr(self, name, torch.nn.Parameter(torch.empty_like(state[f"{prefix}{name}"])))
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("first", [_Renamed, _Grows, lambda: torch.nn.LazyLinear(8)], ids=["renamed", "grows", "lazy"])
def test_a_part_that_loads_in_its_own_way_is_left_to_do_so(checkpoint, first):
    saved = load_model(checkpoint)

    class Model(ToyModel):
        def __init__(self):
            super().__init__()
            self.net[0] = first()

    model = Model()
    _trainer().validate(model, loader(), ckpt_path=str(checkpoint), verbose=False)
    found = {key.replace("inner.", ""): value for key, value in model.state_dict().items()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(saved[key], value) for key, value in found.items())
    model = Model()
    load_weights(checkpoint, model)
    assert torch.equal(next(model.net[0].parameters()), saved["net.0.weight"])
    model = Model()
    model.net[2] = torch.nn.Linear(7, 1)
    with pytest.raises(ModelMismatchError) as error:
        _trainer().validate(model, loader(), ckpt_path=str(checkpoint), verbose=False)
    assert "net.2.weight is (1, 8) in the checkpoint, (1, 7) in the model" in str(error.value)
    assert "net.0" not in str(error.value)


def test_the_same_model_passes(checkpoint):
    check_model(checkpoint, ToyModel().state_dict())


class _Unscheduled(ToyModel):
    def configure_optimizers(self):
        return super().configure_optimizers()[0]


@pytest.mark.parametrize(
    ("model", "precision", "said"),
    [
        (ToyModel, "bf16-true", "6 of 6 parameters are converted from torch.float32 to torch.bfloat16"),
        (_Unscheduled, "32-true", "holds the state of 1 LR schedulers, this run has 0"),
        (ToyModel, "bf16-mixed", ""),
    ],
)
def test_what_goes_on_otherwise_is_said(checkpoint, model, precision, said, caplog):
    _trainer(precision=precision, limit_val_batches=0).fit(model(), loader(), ckpt_path=str(checkpoint))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("nemologger.loading.")]
    assert said in "".join(told)
    assert len(told) == bool(said)


def test_a_file_that_holds_more_than_plain_types_is_an_error_that_says_what_to_do(tmp_path):
    trainer = _trainer(val_check_interval=1)
    model = ToyModel()
    model.hparams["where"] = tmp_path
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(RefusedError, match=r"weights_only=False\)(.|\n)*nemologger\.ModelCheckpoint"):
        _trainer().fit(ToyModel(), loader(), loader(), ckpt_path=str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"PK\x03\x04" * 9, DamagedCheckpointError, "cannot be read"),
        (b"abc" * 9, DamagedCheckpointError, "is no file of torch.save, or damaged"),
        (b"\0" * 999, DamagedCheckpointError, "is no file of torch.save, or damaged"),
        (b"not a checkpoint", DamagedCheckpointError, "is no file of torch.save, or damaged"),  # torch: it runs code
        (None, CheckpointError, "a dictionary with 'layer.weight'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, error, said):
    path = tmp_path / "x.ckpt"
    torch.save({"layer.weight": torch.ones(2)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(error, match=f"x.ckpt(.|\n)*{said}"):
        _trainer().fit(ToyModel(), loader(), loader(), ckpt_path=str(path))


class _Looks(ToyModel):
    """Remembers what a plugin loads for it, at the moment that it is loaded."""

    def load_of(self, trainer):
        plugin, model = trainer.strategy.checkpoint_io, self

        class Spy(type(plugin)):
            def load_checkpoint(self, *args, **kwargs):
                model.given = super().load_checkpoint(*args, **kwargs)
                model.places = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
                return model.given

        plugin.__class__ = Spy
        return self

    @property
    def is_in_place(self):
        return {value.data_ptr() for value in self.given["state_dict"].values()} == self.places


def test_the_model_is_read_into_place(checkpoint):
    saved = load_model(checkpoint)
    trainer = _trainer()
    model = _Looks().load_of(trainer)
    trainer.validate(model, loader(), ckpt_path=str(checkpoint), verbose=False)
    assert model.is_in_place
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert "optimizer_states" not in model.given  # nobody needs it here
    trainer = _trainer()
    model = _Looks().load_of(trainer)
    trainer.fit(model, loader(), loader(), ckpt_path=str(checkpoint))
    assert model.is_in_place
    state = trainer.optimizers[0].state[model.net[0].weight]
    assert state["exp_avg"].data_ptr() == model.given["optimizer_states"][0]["state"][0]["exp_avg"].data_ptr()


def test_a_callback_that_changes_or_keeps_what_is_loaded_does_not_get_the_live_model(checkpoint):
    saved = load_model(checkpoint)

    class Meddles(pl.Callback):
        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            self.kept = checkpoint["state_dict"]
            assert "optimizer_states" in checkpoint
            for value in self.kept.values():
                value.zero_()

        def on_train_start(self, trainer, pl_module):
            self.loaded = {key: value.clone() for key, value in pl_module.state_dict().items()}

    meddles = Meddles()
    trainer = _trainer(callbacks=[meddles])
    model = _Looks().load_of(trainer)
    trainer.fit(model, loader(), loader(), ckpt_path=str(checkpoint))
    assert not model.is_in_place
    assert all(torch.equal(saved[key], value) for key, value in meddles.loaded.items())
    assert not any(value.any() for value in meddles.kept.values())
    trainer = _trainer(callbacks=[Meddles()])
    trainer.validate(ToyModel(), loader(), ckpt_path=str(checkpoint), verbose=False)


def test_a_model_that_takes_what_fits_is_not_overwritten_with_the_rest(checkpoint):
    class Other(_Looks):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Parameter(torch.full((2,), 7.0))

    trainer = _trainer()
    model = Other().load_of(trainer)
    trainer.validate(model, loader(), ckpt_path=str(checkpoint), verbose=False)
    assert not model.is_in_place
    assert torch.equal(model.extra, torch.full((2,), 7.0))
    assert torch.equal(model.net[0].weight, load_model(checkpoint)["net.0.weight"])


def test_nothing_is_overwritten_where_training_could_not_go_on(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5, save_weights_only=True)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(ToyModel(), loader(), loader())
    model = ToyModel()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="no optimizer state"):
        _trainer().fit(model, loader(), loader(), ckpt_path=str(tmp_path / "x"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_was_loaded_is_let_go(checkpoint):
    """A run without a ModelCheckpoint of ours too: where an optimizer is elsewhere, it has copies."""
    trainer = _trainer(enable_checkpointing=False)
    AutoResume(resume_from_path=checkpoint).setup(trainer)
    trainer.fit(ToyModel(), loader(), loader())
    assert trainer.global_step == 7
    assert trainer.strategy.checkpoint_io._loaded is None
    assert trainer.strategy.checkpoint_io._kept is None
