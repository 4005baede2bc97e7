"""What is staged beside training is the state of the moment that the save began, whatever the optimizers do next."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing

import pytest
import torch
from helpers.engine import names_in
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from toy import tensors_of

from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing import in_flight, progress, writer
from nemologger.checkpoint.writing.arena import copy_at_once
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.checkpoint.writing.staging import Staging, comes_to_rest
from nemologger.disk import LocalDisk
from nemologger.errors import RankError, SaveFailedError
from nemologger.ranks import Failure, SingleProcess

WIDTH = 200  # 160 KB: more than what is copied at once


class _Training:
    """A layer with a buffer, and its optimizers."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
        parameters = list(self.net.parameters())
        if kind == "lbfgs":
            self.optimizers = [torch.optim.LBFGS(parameters, max_iter=3)]
        elif kind == "two":
            self.optimizers = [torch.optim.Adam(parameters[:1]), torch.optim.SGD(parameters[1:], 0.1, momentum=0.9)]
        else:
            self.optimizers = [torch.optim.Adam(parameters)]
        self.closure = kind in ("lbfgs", "closure")
        self.batch = torch.randn(8, WIDTH)

    def loss(self) -> torch.Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = (self.net(self.batch) - 1).pow(2).mean()
        loss.backward()
        return loss

    def step(self) -> None:
        if not self.closure:
            self.loss()
        for optimizer in self.optimizers:
            if self.closure:
                optimizer.step(self.loss)
            else:
                optimizer.step()

    def state(self) -> dict:
        return {
            "state_dict": self.net.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def snapshot(self):
        return take(self.state(), frozenset(dict(self.net.named_parameters())))


@pytest.fixture
def slow(monkeypatch):
    """The thread that copies begins late: who does not wait for it is found out."""
    copy = Staging._copy

    def late(self, copies):
        time.sleep(0.3)
        copy(self, copies)

    monkeypatch.setattr(Staging, "_copy", late)


def save_within_a_step(savers, training, directory):
    """Each of ``savers`` saves before the step, under its name, and is done behind it."""
    try:
        for name, saver in savers.items():
            saver.start(training.snapshot(), directory / name, Manifest(step=1, epoch=0))
        training.step()
        for saver in savers.values():
            assert saver.finish() is not None
    finally:
        for saver in savers.values():
            saver.close()


@pytest.mark.parametrize("kind", ["adam", "closure", "two", "lbfgs"])
def test_optimizers_wait_and_what_is_saved_is_the_same_as_at_once(tmp_path, slow, kind):
    training = _Training(kind)
    training.step()
    savers = {mode: AsyncSaver(LocalDisk(), SingleProcess(), staging=mode) for mode in ("at_once", "overlapped")}
    save_within_a_step(savers, training, tmp_path)
    one, other = (list(tensors_of(load_checkpoint(tmp_path / mode))) for mode in savers)
    assert len(one) == len(other) > 4
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for file in ("__0_0.distcp", "__0_1.distcp"):
        assert (tmp_path / "at_once/weights" / file).read_bytes() == (
            tmp_path / "overlapped/weights" / file
        ).read_bytes()
    assert not _global_optimizer_pre_hooks


def test_the_forward_goes_on_while_it_is_copied(tmp_path, monkeypatch):
    go_on, copy = threading.Event(), Staging._copy

    def copy_when_told(self, copies):
        assert go_on.wait(60)
        copy(self, copies)

    monkeypatch.setattr(Staging, "_copy", copy_when_told)
    training = _Training("adam")
    training.step()
    saver = AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")
    try:
        saver.prepare(training.snapshot())
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        training.loss()
        assert any(thread.name == "nemologger-stage" for thread in threading.enumerate())
        assert saver.poll() is None
        go_on.set()
        assert saver.finish() is not None
    finally:
        go_on.set()
        saver.close()


def test_a_parameter_that_somebody_else_changes_fails_the_save_and_the_next_is_at_once(tmp_path, slow, caplog):
    training = _Training("adam")
    training.step()
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver:
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        with torch.no_grad():
            training.net[0].weight.clamp_(-0.01, 0.01)
        with pytest.raises(SaveFailedError, match=r"state_dict\.0\.weight changed while being copied"):
            saver.finish()
        assert not (tmp_path / "a" / "manifest.json").exists()
        before = training.net[0].weight.detach().clone()
        saver.start(training.snapshot(), tmp_path / "b", Manifest(step=1, epoch=0))
        with torch.no_grad():
            training.net[0].weight.clamp_(-0.001, 0.001)
        assert saver.finish() is not None
    assert torch.equal(load_checkpoint(tmp_path / "b")["state_dict"]["0.weight"], before)


def test_a_parameter_that_is_replaced_or_waited_for_is_saved_as_it_was(tmp_path, slow):
    training = _Training("adam")
    training.step()
    before = training.net[0].weight.detach().clone()
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver:
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        training.net[0].weight.data = torch.zeros(WIDTH, WIDTH)
        assert saver.finish() is not None
        training.net[0].weight.data = before.clone()
        saver.start(training.snapshot(), tmp_path / "b", Manifest(step=1, epoch=0))
        saver.hold()
        training.net[0].weight.data.zero_()
        assert saver.finish() is not None
    for name in ("a", "b"):
        assert torch.equal(load_checkpoint(tmp_path / name)["state_dict"]["0.weight"], before)


def test_two_callbacks_may_stage_at_the_same_time(tmp_path, slow):
    training = _Training("adam")
    training.step()
    savers = {name: AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped") for name in ("a", "b")}
    before = training.net[0].weight.detach().clone()
    save_within_a_step(savers, training, tmp_path)
    for name in savers:
        assert torch.equal(load_checkpoint(tmp_path / name)["state_dict"]["0.weight"], before)
    assert not _global_optimizer_pre_hooks


def test_a_save_that_is_given_up_leaves_no_hook_and_no_thread(tmp_path, slow):
    training = _Training("adam")
    training.step()
    saver = AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")
    saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
    saver.close()
    assert not _global_optimizer_pre_hooks
    assert not [thread for thread in threading.enumerate() if thread.name == "nemologger-stage"]
    with pytest.raises(SaveFailedError):
        saver.finish()


@pytest.mark.parametrize("mode", ["at_once", "overlapped"])
def test_a_state_of_one_large_tensor_or_none(tmp_path, mode):
    copy_at_once([])  # a rank that has nothing to write
    net = nn.Linear(WIDTH, WIDTH, bias=False)
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging=mode)) as saver:
        for name, state in (("one", net.state_dict()), ("none", {})):
            saver.start(take({"state_dict": state}), tmp_path / name, Manifest(step=1, epoch=0))
            assert saver.finish() is not None
    assert torch.equal(load_checkpoint(tmp_path / "one")["state_dict"]["weight"], net.weight)
    assert not load_checkpoint(tmp_path / "none")["state_dict"]


class _OtherRank(SingleProcess):
    """There is another rank, which fails to copy its state."""

    fails = False

    def exchange(self, value, answer):
        others = [Failure.of(RankError("no memory"), 1)] if self.fails and value is None else []
        return answer([value, *others])


def test_when_another_rank_cannot_copy_nothing_is_left_of_it_here(tmp_path, slow, monkeypatch):
    training = _Training("adam")
    training.step()
    with closing(AsyncSaver(LocalDisk(), _OtherRank(), staging="overlapped")) as saver:
        saver.prepare(training.snapshot())
        with monkeypatch.context() as patched:
            patched.setattr(_OtherRank, "fails", True)
            with pytest.raises(SaveFailedError, match="rank 1: no memory"):
                saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        assert not saver.busy
        assert not _global_optimizer_pre_hooks
        assert not [thread for thread in threading.enumerate() if thread.name == "nemologger-stage"]
        saver.start(training.snapshot(), tmp_path / "b", Manifest(step=1, epoch=0))
        assert saver.finish() is not None
    assert names_in(tmp_path) == {"b"}


class _Broken:
    """An event, or a stream, of a device that has failed."""

    def query(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    synchronize = query

    def wait_event(self, event):
        self.query()


@pytest.mark.parametrize("ask", ["poll", "finish", "close"])
def test_what_a_device_reports_fails_the_save(tmp_path, slow, monkeypatch, ask):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Broken())
    training = _Training("adam")
    training.step()
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver:
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        staging = saver._in_flight.staging
        staging._events.append((torch.device("cuda"), _Broken()))
        staging._thread.join()
        if ask == "close":
            saver.close()
        else:
            with pytest.raises(SaveFailedError, match="could not be copied: CUDA error: an illegal memory access"):
                getattr(saver, ask)()
    assert not _global_optimizer_pre_hooks
    assert not [thread for thread in threading.enumerate() if thread.name == "nemologger-stage"]


class _Waits:
    """An event behind a collective that a rank is missing from; or one that comes."""

    def __init__(self, until: float = float("inf")) -> None:
        self.until = until

    def query(self):
        return time.monotonic() > self.until

    def synchronize(self):
        time.sleep(60)


class _Goes:
    def wait_event(self, event):
        if isinstance(event, _Broken):
            event.query()


@pytest.mark.parametrize("ask", ["finish", "finish_alone", "give_up", "close"])
def test_copies_behind_a_rank_that_is_gone_are_not_waited_for(tmp_path, monkeypatch, caplog, ask):
    """Else whoever is to say that it is gone would hang, too. What they are copied to is not used again."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Goes())
    for limit in ("PATIENCE", "QUIET", "STALLED", "TURN"):
        monkeypatch.setattr(in_flight, limit, 0.1)
    training = _Training("adam")
    training.step()
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver:
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        saver._in_flight.staging._events.append((torch.device("cuda"), _Waits()))
        arena, began = saver._equipment.layout.arena, time.monotonic()
        if ask == "finish":
            with pytest.raises(SaveFailedError, match="the state was not copied"):
                saver.finish()
        else:
            getattr(saver, ask)(**{"others_are_there": False} if ask == "finish_alone" else {})
        assert time.monotonic() - began < 30
        assert "may wait for a rank that has stopped" in caplog.text
        assert arena.descriptor == -1
        assert not _global_optimizer_pre_hooks
        if ask == "finish":
            monkeypatch.setattr(in_flight, "STALLED", 60.0)
            saver.start(training.snapshot(), tmp_path / "b", Manifest(step=1, epoch=0))
            assert saver.finish() is not None


def test_one_device_that_has_failed_does_not_end_the_wait_for_others(tmp_path, monkeypatch):
    """They still copy to the memory that the next save takes."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Goes())
    training = _Training("adam")
    training.step()
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver:
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        late = _Waits(time.monotonic() + 0.3)
        events = [(torch.device("cuda", 0), _Broken()), (torch.device("cuda", 1), late)]
        saver._in_flight.staging._events += events
        with pytest.raises(SaveFailedError, match="an illegal memory access"):
            saver.finish()
        assert late.query()


def test_a_device_that_waits_for_ever_is_not_waited_for(monkeypatch):
    class Stream:
        left = 3

        def query(self):
            self.left -= 1
            return self.left == 0

    stream, cuda = Stream(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert comes_to_rest(torch.device("cpu"), 0.0)
    assert stream.left == 3
    assert comes_to_rest(cuda, 10.0)
    assert not comes_to_rest(cuda, 0.1)


def test_while_it_waits_it_says_how_far_the_writer_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(in_flight, "TURN", 0.05)
    monkeypatch.setattr(in_flight, "STALLED", 10.0)
    said = f"checkpoint {tmp_path / 'a'}: 0 of 0 MB written"
    training = _Training("adam")
    with closing(AsyncSaver(LocalDisk(), SingleProcess())) as saver:
        saver.prepare(training.snapshot())
        pid = saver._equipment.layout.writer.pid
        os.kill(pid, signal.SIGSTOP)

        def go_on_when_said(record):
            if record.getMessage() == said:
                os.kill(pid, signal.SIGCONT)
            return True

        monkeypatch.setattr(progress.log, "filters", [go_on_when_said])
        saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
        with caplog.at_level("INFO"):
            assert saver.finish() is not None
    assert said in caplog.text


def test_storage_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    training = _Training("adam")
    with closing(AsyncSaver(LocalDisk(), SingleProcess())) as saver:
        with monkeypatch.context() as impatient:
            impatient.setattr(in_flight, "TURN", 0.05)
            impatient.setattr(in_flight, "STALLED", 0.2)
            saver.prepare(training.snapshot())
            os.kill(saver._equipment.layout.writer.pid, signal.SIGSTOP)
            saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0))
            with pytest.raises(SaveFailedError, match="the storage does not answer"):
                saver.finish()
            assert not (tmp_path / "a" / "manifest.json").exists()
        saver.start(training.snapshot(), tmp_path / "b", Manifest(step=2, epoch=0))
        assert saver.finish() is not None


def test_a_writer_that_takes_no_job_holds_training_up_for_a_bounded_time(tmp_path, monkeypatch):
    training = _Training("adam")

    def more_than_fits_on_the_way(directory, disk):
        disk.write(directory / "large", [bytes(2**21)])

    with closing(AsyncSaver(LocalDisk(), SingleProcess())) as saver:
        with monkeypatch.context() as impatient:
            impatient.setattr(writer, "_SEND_TIMEOUT", 0.2)
            saver.prepare(training.snapshot())
            os.kill(saver._equipment.layout.writer.pid, signal.SIGSTOP)
            saver.start(training.snapshot(), tmp_path / "a", Manifest(step=1, epoch=0), more_than_fits_on_the_way)
            with pytest.raises(SaveFailedError, match=r"the writer process \d+ has taken nothing for 0.2 s"):
                saver.finish()
            assert not (tmp_path / "a" / "manifest.json").exists()
        saver.start(training.snapshot(), tmp_path / "b", Manifest(step=2, epoch=0), more_than_fits_on_the_way)
        assert saver.finish() is not None
