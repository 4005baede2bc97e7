"""Staging beside training, through a Trainer: whoever steps the optimizers, the checkpoints are the same as at once."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from processes import torchrun
from toy import ToyModel, loader, manifests, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.writing.staging import Staging
from nemologger.lightning_port import hooks_between_steps

WIDTH = 4000  # parameters large enough to be copied beside training


class _Manual(ToyModel):
    """Two optimizers, stepped by hand; one of them past Lightning."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width=width)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        one, two = self.optimizers()
        loss = (self.net(batch) - 1).pow(2).mean()
        one.zero_grad()
        two.zero_grad()
        self.manual_backward(loss)
        two.optimizer.step()
        one.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self.net(batch) - 1).pow(2).mean())

    def configure_optimizers(self):
        first, *rest = self.parameters()
        return [torch.optim.Adam([first], 1e-2), torch.optim.Adam(rest, 1e-2)]


class _Closure(ToyModel):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class _Accumulating(ToyModel):
    """Whose weights are swapped for validation."""

    def on_validation_start(self):
        self.kept = {name: p.detach().clone() for name, p in self.named_parameters()}
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(0.5)

    def on_validation_end(self):
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(self.kept[name])


class _Clipping(ToyModel):
    """Changes its parameters between two steps, as some do."""

    def on_train_batch_start(self, batch, batch_idx):
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.1, 0.1)


class _Teacher(ToyModel):
    """Averages its parameters into a second network in every training step, as MoCo, BYOL and DINO do."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width=width)
        self.teacher = torch.nn.Linear(8, width).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.teacher.weight.data.mul_(0.5).add_(1.0)  # past torch's version counter
        return super().training_step(batch, batch_idx)


def _run(directory: Path, model: pl.LightningModule, staging: str, **options) -> ModelCheckpoint:
    checkpoint = ModelCheckpoint(
        dirpath=directory, filename="{step}", every_n_train_steps=2, async_save=True, staging=staging, save_top_k=-1,
        save_last=False, monitor=None,
    )  # fmt: skip
    quiet_trainer(max_steps=8, val_check_interval=3, callbacks=[checkpoint], **options).fit(model, loader(), loader())
    return checkpoint


@pytest.fixture
def slow(monkeypatch):
    copy = Staging._copy

    def late(self, copies):
        time.sleep(0.1)
        copy(self, copies)

    monkeypatch.setattr(Staging, "_copy", late)


def _files(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*.distcp"))}


@pytest.mark.parametrize("kind", [ToyModel, _Manual, _Closure, _Accumulating, _Teacher])
def test_the_checkpoints_are_the_same(tmp_path, slow, kind):
    options = {"accumulate_grad_batches": 2} if kind is _Accumulating else {}
    for staging in ("at_once", "overlapped"):
        _run(tmp_path / staging, kind(width=WIDTH), staging, **options)
    at_once, overlapped = _files(tmp_path / "at_once"), _files(tmp_path / "overlapped")
    assert {2, 4, 6, 8} <= {manifest.step for manifest in manifests(tmp_path / "overlapped").values()}
    assert at_once == overlapped


def test_a_model_that_changes_parameters_itself_loses_one_save_loudly(tmp_path, slow, caplog):
    _run(tmp_path / "overlapped", _Clipping(width=WIDTH), "overlapped")
    assert "changed while being copied" in caplog.text
    saved = {manifest.step for manifest in manifests(tmp_path / "overlapped").values()}
    assert saved == {4, 6, 8}
    caplog.clear()
    _run(tmp_path / "auto", _Clipping(width=WIDTH), "auto")
    assert "changed while" not in caplog.text
    for name in manifests(tmp_path / "overlapped"):
        one, other = (load_checkpoint(tmp_path / kind / name)["state_dict"] for kind in ("overlapped", "auto"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_says_how_much_memory_it_takes_and_refuses_what_it_does_not_know(tmp_path, caplog):
    with caplog.at_level("INFO"):
        _run(tmp_path, ToyModel(width=WIDTH), "auto")
    assert "saving beside training takes 1 MB of memory on this rank" in caplog.text
    with pytest.raises(ConfigurationError, match="staging='later'"):
        ModelCheckpoint(staging="later")
    caplog.clear()
    ModelCheckpoint(staging="overlapped")
    assert "has no effect without async_save" in caplog.text


def test_the_hooks_that_may_change_parameters_are_known():
    assert hooks_between_steps(_Clipping()) == ["on_train_batch_start"]
    assert hooks_between_steps(ToyModel()) == []


@pytest.mark.dist
def test_shards_of_fsdp(tmp_path):
    kinds = ("fsdp2", "fsdp")
    torchrun(Path(__file__).with_name("helpers") / "overlapped.py", 2, tmp_path, *kinds)
    for kind in kinds:
        at_once, overlapped = _files(tmp_path / kind / "at_once"), _files(tmp_path / kind / "overlapped")
        assert len(at_once) >= 3 * 2, "three steps, two ranks"
        assert at_once == overlapped
