"""The states of optimizers that a fit goes on with."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import SWALR
from toy import ToyModel, loader, quiet_trainer

from nemologger import AutoResume, ModelCheckpoint, ModelMismatchError
from nemologger.callbacks.restore_weights import RestoreWeights
from nemologger.checkpoint.weights.unpickler import MetadataUnpickler
from nemologger.loading.checkpoint_io import install


class _Two(ToyModel):
    """Two parameters of one shape, given to the optimizer in one order or the other."""

    def __init__(self, *, swapped: bool = False, kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        super().__init__()
        self.swapped, self.kind = swapped, kind

    def configure_optimizers(self):
        parameters = list(self.net.parameters())
        return self.kind(parameters[::-1] if self.swapped else parameters, lr=1e-2)


def _moments(model: ToyModel) -> dict[str, torch.Tensor]:
    state = model.trainer.optimizers[0].state
    return {name: state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["with a callback", "without", "AutoResume"])
def test_optimizer_state_follows_the_names_not_the_order(tmp_path, how):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    first = _Two()
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(first, loader(), loader())
    expected = _moments(first)
    seen = {}

    class Swapped(_Two):
        def on_train_start(self):
            seen.update(_moments(self))

    again = [ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)] if how == "with a callback" else []
    trainer = quiet_trainer(max_steps=6, callbacks=again, enable_checkpointing=bool(again))
    if how == "AutoResume":
        AutoResume(resume_from_path=tmp_path / "x").setup(trainer)
    elif how == "without":
        install(trainer)
    given = None if how == "AutoResume" else str(tmp_path / "x")
    trainer.fit(Swapped(swapped=True), loader(), loader(), ckpt_path=given)
    assert seen
    assert all(torch.equal(expected[name], value) for name, value in seen.items())


def test_another_optimizer_is_refused_with_what_differs(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(_Two(), loader(), loader())
    again = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    with pytest.raises(ModelMismatchError, match=r"has no dampening, momentum, nesterov"):
        quiet_trainer(max_steps=9, callbacks=[again]).fit(
            _Two(kind=torch.optim.SGD), loader(), loader(), ckpt_path=str(tmp_path / "x")
        )


class _Scheduled(ToyModel):
    """Has a scheduler, or not, and remembers what its optimizer begins with."""

    def __init__(self, *, scheduled: bool) -> None:
        super().__init__()
        self.scheduled = scheduled

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5 if self.scheduled else 0.25, momentum=0.9)
        if not self.scheduled:
            return optimizer
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.1, 20), "interval": "step"}]

    def on_train_start(self):
        (optimizer,) = self.trainer.optimizers
        self.group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        self.momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]


def test_a_scheduler_can_be_added_on_resume(tmp_path):
    """To cool down, say. What it keeps in the optimizer stays there."""
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    first = _Scheduled(scheduled=False)
    trainer = quiet_trainer(max_steps=5, callbacks=[saves])
    trainer.fit(first, loader(), loader())
    rest = _Scheduled(scheduled=True)
    again = quiet_trainer(max_steps=7, enable_checkpointing=False)
    AutoResume(resume_from_path=tmp_path / "x").setup(again)
    again.fit(rest, loader(), loader())
    assert (rest.group["lr"], rest.group["initial_lr"], rest.group["max_lr"]) == (0.25, 0.1 / 25, 0.1)
    momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
    assert all(torch.equal(*pair) for pair in zip(momenta, rest.momenta, strict=True))
    assert sorted(rest.losses) == [5, 6]


class _InDouble(torch.optim.Optimizer):
    """Its state has more digits than the parameters: torch rounds that when it loads it, which is put right."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure):
        closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["sum"] = state.get("sum", 0.0) + parameter.grad.double()
            parameter.data.sub_(1e-3 * state["sum"])


class _KeepsDigits(ToyModel):
    def configure_optimizers(self):
        return _InDouble(self.parameters())


def test_what_lies_where_is_read_once(tmp_path, monkeypatch):
    """Of tens of thousands of tensors that takes a second, and once for each of them hours."""
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(_KeepsDigits(), loader(), loader())
    reads = []
    load = MetadataUnpickler.load
    monkeypatch.setattr(MetadataUnpickler, "load", lambda self: reads.append(self) or load(self))
    trainer = quiet_trainer(max_steps=7, enable_checkpointing=False)
    AutoResume(resume_from_path=tmp_path / "x").setup(trainer)
    trainer.fit(_KeepsDigits(), loader(), loader())
    assert trainer.global_step == 7
    assert len(reads) == 1


def test_nothing_is_said_of_the_schedule_that_averages_have_replaced(tmp_path, caplog):
    def trainer(steps: int, saves: ModelCheckpoint) -> pl.Trainer:
        averages = StochasticWeightAveraging(1e-3, swa_epoch_start=2)
        return quiet_trainer(max_steps=steps, max_epochs=9, limit_train_batches=3, callbacks=[averages, saves])

    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    trainer(5, saves).fit(ToyModel(), loader(), loader())
    again = trainer(7, ModelCheckpoint(dirpath=tmp_path))
    install(again)
    again.fit(ToyModel(), loader(), loader(), ckpt_path=str(tmp_path / "x"))
    assert isinstance(again.lr_scheduler_configs[0].scheduler, SWALR)
    assert not [record for record in caplog.records if record.name == "nemologger.loading.optimizer_states"]


def test_what_is_frozen_since_is_named_and_what_to_do(tmp_path):
    class Frozen(_Two):
        def configure_optimizers(self):
            return self.kind(self.net[2].parameters(), lr=1e-2)

    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    quiet_trainer(max_steps=5, callbacks=[saves]).fit(_Two(), loader(), loader())
    again = ModelCheckpoint(dirpath=tmp_path, filename="x", every_n_train_steps=5)
    with pytest.raises(ModelMismatchError, match=r"only there: net\.0\.bias, .*only here: none.*RestoreConfig"):
        quiet_trainer(max_steps=9, callbacks=[again]).fit(Frozen(), loader(), loader(), ckpt_path=str(tmp_path / "x"))


class _Stops(pl.Callback):
    """Before the first step, in which an optimizer whose state is too small would write behind its end."""

    def on_train_start(self, trainer, pl_module):
        raise InterruptedError


class _Fused(ToyModel):
    """It goes through the memory of the state as far as the parameter reaches."""

    swapped = False

    def configure_optimizers(self):
        parameters = list(self.net.parameters())
        return torch.optim.AdamW(parameters[::-1] if self.swapped else parameters, lr=1e-2, fused=True)


class _FusedOtherwise(_Fused):
    swapped = True


@pytest.mark.parametrize("restores", [True, False])
def test_a_fused_optimizer_gets_no_state_of_other_sizes_from_a_file(tmp_path, restores):
    """Lightning's know no names. Of one that is not fused, torch says so itself."""
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(_Fused(), loader(), loader())
    file = tmp_path / "x.ckpt"
    trainer.save_checkpoint(file)
    callbacks = [RestoreWeights(file, optimizer=True)] if restores else []
    again = quiet_trainer(max_steps=4, callbacks=[*callbacks, _Stops()], enable_checkpointing=False)
    install(again)
    with pytest.raises(
        ModelMismatchError, match=r"x\.ckpt, optimizer 0: it holds exp_avg of shape .* for net\..*order"
    ):
        again.fit(_FusedOtherwise(), loader(), loader(), ckpt_path=None if restores else str(file))


class _Shrinks(pl.Callback):
    """Some of the optimizer's state, before it is saved."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.optimizers[0].state[pl_module.net[0].weight]["exp_avg_sq"] = torch.zeros(3)


@pytest.mark.parametrize("restores", [True, False])
def test_nor_from_a_checkpoint(tmp_path, restores):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", monitor=None, every_n_train_steps=1)
    quiet_trainer(max_steps=1, callbacks=[_Shrinks(), saves]).fit(_Fused(), loader(), loader())
    callbacks = [RestoreWeights(tmp_path / "x", optimizer=True)] if restores else []
    again = quiet_trainer(max_steps=4, callbacks=[*callbacks, _Stops()], enable_checkpointing=False)
    install(again)
    with pytest.raises(
        ModelMismatchError, match=r"exp_avg_sq of shape \(3,\) for net.0.weight, whose shape is \(8, 8\)"
    ):
        again.fit(_Fused(), loader(), loader(), ckpt_path=None if restores else str(tmp_path / "x"))


@pytest.mark.parametrize("file", [True, False])
def test_a_fused_optimizer_goes_on_with_its_own(tmp_path, file):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="x", monitor=None, every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=2, callbacks=[saves])
    trainer.fit(_Fused(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = quiet_trainer(max_steps=4, enable_checkpointing=False)
    install(again)
    again.fit(_Fused(), loader(), loader(), ckpt_path=str(tmp_path / ("x.ckpt" if file else "x")))
    assert again.global_step == 4
