"""Saving beside training: the same checkpoints, and nothing left behind."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from processes import torchrun
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint, SaveFailedError
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.verify import problems
from nemologger.disk import LocalDisk
from nemologger.saving import saves

SCRIPT = Path(__file__).with_name("train_toy.py")


class _Watch(pl.Callback):
    """Keeps the model's state after every step, and the writers it has seen. It comes before ModelCheckpoint."""

    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.writers: set[int] = set()
        self.at = at or {}
        self.before: dict[int, Any] = {}  # as ``at``, but while something may be under way

    def on_train_batch_start(self, trainer, *args):
        self.writers |= _writers()
        if trainer.global_step in self.before:
            self.before[trainer.global_step](self)
            _settle(trainer)
        if trainer.global_step in self.at:
            _settle(trainer)
            self.at[trainer.global_step](self)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}
        time.sleep(0.02)


def _settle(trainer) -> None:
    """Let what is under way be published: a busy machine takes longer than a step."""
    checkpoint = trainer.checkpoint_callback
    end = time.monotonic() + 30
    while checkpoint._keeper.busy and time.monotonic() < end:
        checkpoint._poll(trainer)
        time.sleep(0.01)


def _writers() -> set[int]:
    """The writer processes that this process has started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in children if b"writer_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def _run(directory: Path, steps: int = 12, *, watch: _Watch | None = None, width: int = 8, **options: Any):
    settings = {"dirpath": directory, "filename": "{step}", "every_n_train_steps": 2, "async_save": True, **options}
    checkpoint = ModelCheckpoint(**settings)
    watch = watch or _Watch()
    trainer = quiet_trainer(max_steps=steps, val_check_interval=2, callbacks=[watch, checkpoint])
    model = ToyModel(width=width)
    trainer.fit(model, loader(), loader())
    return checkpoint, watch, model


@pytest.mark.parametrize("last", [True, "link", False])
def test_every_checkpoint_is_whole_and_of_its_own_step(tmp_path, last):
    checkpoint, watch, _ = _run(tmp_path, save_top_k=-1, save_last=last)
    expected = {f"step={step}" for step in range(2, 13, 2)} | ({"step=12-last"} if last else set())
    assert set(names(tmp_path)) == expected
    for name, manifest in manifests(tmp_path).items():
        assert problems(tmp_path / name) == []
        saved = load_checkpoint(tmp_path / name)
        assert saved["global_step"] == manifest.step
        assert all(torch.equal(saved["state_dict"][k], v) for k, v in watch.states[manifest.step].items())
        assert {int(s["step"]) for s in saved["optimizer_states"][0]["state"].values()} == {manifest.step}
        assert (tmp_path / name / "context" / "io.json").exists()
    assert Path(checkpoint.best_model_path).parent == tmp_path


def test_the_same_is_kept_as_when_saving_waits(tmp_path):
    beside, _, one = _run(tmp_path / "beside", save_top_k=2)
    waiting, _, other = _run(tmp_path / "waiting", save_top_k=2, async_save=False)
    assert names(tmp_path / "beside") == names(tmp_path / "waiting")
    assert one.losses == other.losses
    assert {Path(p).name: s for p, s in beside.best_k_models.items()} == {
        Path(p).name: s for p, s in waiting.best_k_models.items()
    }


def test_a_run_goes_on_from_it(tmp_path):
    first, _, _ = _run(tmp_path, 6)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, async_save=True)
    model = ToyModel()
    quiet_trainer(max_steps=9, val_check_interval=2, callbacks=[checkpoint]).fit(
        model, loader(), loader(), ckpt_path=first.last_model_path
    )
    _, _, straight = _run(tmp_path / "straight", 9)
    assert model.losses == {step: loss for step, loss in straight.losses.items() if step >= 6}


def test_nothing_is_left_running(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    _, watch, _ = _run(tmp_path)
    assert watch.writers
    assert not any(Path(f"/proc/{pid}").exists() for pid in watch.writers)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # listdir's own


def test_nothing_is_left_running_after_an_error_and_what_was_under_way_is_published(tmp_path):
    def stop(watch: _Watch) -> None:
        raise KeyError("stop here")

    watch = _Watch({4: stop})
    with pytest.raises(KeyError):
        _run(tmp_path, watch=watch)
    assert "step=4-last" in names(tmp_path)
    assert all(problems(tmp_path / name) == [] for name in names(tmp_path))
    assert not any(Path(f"/proc/{pid}").exists() for pid in watch.writers)


def test_loader_workers_that_are_forked_later_do_not_keep_the_writer_waiting(tmp_path):
    """They inherit what it listens to: that this end is closed says nothing as long as they are there."""

    def stop(watch: _Watch) -> None:
        watch.stopped = time.monotonic()
        raise KeyError("stop here")

    watch = _Watch({14: stop})  # in the second epoch, which has workers of its own
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, async_save=True)
    trainer = quiet_trainer(max_steps=20, val_check_interval=2, callbacks=[watch, checkpoint])
    with pytest.raises(KeyError):
        trainer.fit(ToyModel(), DataLoader(ToyData(), batch_size=BATCH, num_workers=1), loader())
    assert time.monotonic() - watch.stopped < 20
    assert "step=14-last" in names(tmp_path)


def _signal(number: int) -> Any:
    def send(watch: _Watch) -> None:
        for pid in _writers():
            os.kill(pid, number)

    return send


@pytest.mark.parametrize("staging", ["at_once", "overlapped"])
def test_a_writer_that_dies_loses_what_it_was_writing_and_is_replaced(tmp_path, caplog, staging):
    watch = _Watch({3: _signal(signal.SIGSTOP)})
    watch.before = {5: _signal(signal.SIGKILL)}  # in the middle of the save of step 4
    _run(tmp_path, 10, watch=watch, save_top_k=-1, staging=staging)
    failed = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failed) == 1
    assert "step=4 was not saved" in failed[0]
    assert "has died (exit code -9)" in failed[0]
    assert {m.step for m in manifests(tmp_path).values()} == {2, 6, 8, 10}
    assert all(problems(tmp_path / name) == [] for name in names(tmp_path))


def test_a_writer_that_dies_with_nothing_to_do_costs_no_save(tmp_path, caplog):
    watch = _Watch({5: _signal(signal.SIGKILL)})
    _run(tmp_path, 8, watch=watch, save_top_k=-1)
    assert "has died, or was ended: another one is started" in caplog.text
    assert not [record for record in caplog.records if record.levelno == logging.ERROR]
    assert {m.step for m in manifests(tmp_path).values()} == {2, 4, 6, 8}
    assert all(problems(tmp_path / name) == [] for name in names(tmp_path))


class _Best(ToyModel):
    """What it puts into checkpoints is there after the first validation."""

    def on_validation_epoch_end(self):
        self.best = 1.0

    def on_save_checkpoint(self, checkpoint):
        checkpoint["best"] = self.best


@pytest.mark.parametrize("possible", [True, False])
def test_a_state_that_cannot_be_taken_before_anybody_asks_for_it_does_not_end_the_run(
    tmp_path, caplog, monkeypatch, possible
):
    """Memory and writer are made after the first step, for a save that comes much later; or then, if they can be."""
    if not possible:
        monkeypatch.delattr(os, "memfd_create")
    ckpt = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, async_save=True, save_top_k=-1)
    quiet_trainer(max_steps=6, val_check_interval=2, callbacks=[ckpt]).fit(_Best(), loader(), loader())
    assert "the state after the first step cannot be taken (AttributeError" in caplog.text
    assert ("Saves are synchronous" in caplog.text) is not possible
    assert names(tmp_path) == ["step=2", "step=4", "step=6", "step=6-last"]
    assert load_checkpoint(tmp_path / "step=2")["best"] == 1.0


def test_a_writer_that_runs_out_of_space_is_reported_and_the_next_save_works(tmp_path, caplog):
    """The limit on file sizes fails a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(watch: _Watch, size: int) -> None:
        for pid in watch.writers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    watch = _Watch({3: lambda w: limit(w, 2000), 7: lambda w: limit(w, soft)})
    with caplog.at_level(logging.ERROR):
        _run(tmp_path, 12, watch=watch, save_top_k=-1, width=64)
    failed = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(failed) == 2
    assert "File too large" in failed[0]
    assert {m.step for m in manifests(tmp_path).values()} == {2, 8, 10, 12}


def test_too_many_failures_in_a_row_end_the_run(tmp_path):
    def limit(watch: _Watch) -> None:
        for pid in watch.writers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with pytest.raises(SaveFailedError, match="File too large"):
        _run(tmp_path, 40, watch=_Watch({3: limit}), width=64)
    assert "step=2-last" in names(tmp_path)


class _NoManifest(LocalDisk):
    """Cannot publish ``step=4``."""

    def write(self, path, parts):
        if path.name == "manifest.json" and path.parent.name.startswith("step=4"):
            raise OSError(5, "Input/output error", str(path))
        super().write(path, parts)


def test_a_failed_commit_is_reported_too(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        _run(tmp_path, 8, save_top_k=-1, disk=_NoManifest())
    assert "Input/output error" in caplog.text
    assert names(tmp_path) == ["step=2", "step=6", "step=8", "step=8-last"]


def test_a_busy_writer_can_be_waited_for_or_skipped(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(saves, "_ANSWER", 60.0)  # for the disk, which is not what is busy here

    def slow(watch: _Watch) -> None:
        for pid in watch.writers:
            os.kill(pid, signal.SIGSTOP)

    def go(watch: _Watch) -> None:
        for pid in watch.writers:
            os.kill(pid, signal.SIGCONT)

    def rest(watch: _Watch) -> None:
        pass

    watch = _Watch({3: slow, 9: rest, 11: rest})
    watch.before = {7: go}
    _run(tmp_path, 12, watch=watch, save_top_k=-1, on_busy="skip")
    assert {m.step for m in manifests(tmp_path).values()} == {2, 4, 8, 10, 12}
    assert "step 6 is not saved" in caplog.text
    with pytest.raises(ConfigurationError, match="on_busy"):
        ModelCheckpoint(on_busy="never")


@pytest.mark.dist
def test_two_ranks(tmp_path):
    torchrun(SCRIPT, 2, tmp_path, 8, "--every", 2, "--devices", 2, "--beside", "--pause", 0.05, "--width", 64)
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert all(problems(checkpoints / name) == [] for name in names(checkpoints))
    saved = manifests(checkpoints)
    assert {m.world_size for m in saved.values()} == {2}
    assert len(saved) == 3
    assert saved["step=8-last"].step == 8
    weights = checkpoints / "step=8-last" / "weights"
    assert not [name for name in names(weights) if name.startswith(".written")]
    assert [n for n in names(weights) if n.endswith("distcp")] == [
        "__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp",
    ]  # fmt: skip


class Failing(ToyModel):
    """Fails in its third step; from then on its state cannot be read, as after an error of CUDA."""

    broken = False

    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            self.broken = True
            raise ZeroDivisionError("this is what went wrong")
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("beside", [False, True])
def test_a_state_that_cannot_be_read_any_more_does_not_hide_what_went_wrong(tmp_path, caplog, beside):
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}", async_save=beside,
        save_on_exception=True, staging="overlapped" if beside else "auto",
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError, match="this is what went wrong"):
        quiet_trainer(max_steps=9, callbacks=[ckpt]).fit(Failing(), loader())
    assert "the state at the exception could not be saved" in caplog.text
    assert names(tmp_path) == [".trained_steps", "step=2", "step=2-last"]


def test_what_is_written_is_published_during_a_validation(tmp_path):
    """Who is killed in the middle of a long one has the checkpoint before it."""

    class Looks(pl.Callback):
        published: float | None = None

        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                (self.writer,) = _writers()
                os.kill(self.writer, signal.SIGSTOP)  # it is not done when validation begins

        def on_validation_start(self, trainer, pl_module):
            if trainer.global_step == 5:
                assert "step=4-unfinished" in names(tmp_path)
                os.kill(self.writer, signal.SIGCONT)

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if trainer.global_step == 5 and self.published is None:
                time.sleep(0.02)
                self.published = batch_idx if (tmp_path / "step=4" / "manifest.json").exists() else None

    looks = Looks()
    checkpoint = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=4, async_save=True
    )
    trainer = quiet_trainer(max_steps=6, val_check_interval=5, callbacks=[looks, checkpoint], limit_val_batches=None)
    trainer.fit(ToyModel(), loader(), DataLoader(ToyData(), batch_size=BATCH, sampler=[0] * 4000))
    assert looks.published is not None
    assert looks.published < 990


class _SlowToSync(LocalDisk):
    """As a shared file system at a bad moment; remembers who waited for it."""

    def __init__(self) -> None:
        self.waited: list[threading.Thread] = []

    def sync(self, directory: Path) -> None:
        self.waited.append(threading.current_thread())
        time.sleep(0.02)
        super().sync(directory)


def test_training_does_not_wait_while_a_checkpoint_is_published(tmp_path):
    disk = _SlowToSync()
    ckpt = ModelCheckpoint(dirpath=tmp_path, monitor=None, every_n_train_steps=2, async_save=True, disk=disk)
    waited: dict[int, int] = {}

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            waited[trainer.global_step] = sum(one is threading.main_thread() for one in disk.waited)
            _settle(trainer)  # else the next save waits, in this thread

    quiet_trainer(max_steps=12, callbacks=[Counts(), ckpt], logger=False).fit(ToyModel(), loader())
    assert waited[12] - waited[4] <= 4, waited  # of each of these saves for the marker alone
    assert len(disk.waited) > 40
