"""A disk that does not answer for a while, as that of a server which is away: training goes on without its saves."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
from toy import ToyModel, loader, manifests, names, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.writing import in_flight, progress
from nemologger.saving import saves

CALLS = ["lstat", "mkdir", "open", "readlink", "rename", "replace", "rmdir", "scandir", "stat", "symlink", "unlink"]


class Mount:
    """Everything that asks for a path below ``directory`` waits while it hangs; so do the writer processes.

    Only then is an answer not waited for: one that does not hang may take its time on a busy machine.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = str(directory)
        self.answers = threading.Event()
        self.answers.set()
        self.waited: list[threading.Thread] = []
        self.stopped: list[int] = []
        monkeypatch.setattr(saves, "_ANSWER", 60.0)
        for module, name in [(os, call) for call in CALLS] + [(io, "open")]:
            monkeypatch.setattr(module, name, self._waiting(getattr(module, name)))

    def _waiting(self, call):
        def waits(path, *arguments, **named):
            if not self.answers.is_set() and str(path).startswith(self.directory):
                self.waited.append(threading.current_thread())
                self.answers.wait(timeout=120)
            return call(path, *arguments, **named)

        return waits

    def hang(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self.stopped = [int(p) for p in children if b"writer_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        for pid in self.stopped:
            os.kill(pid, signal.SIGSTOP)
        self.answers.clear()
        saves._ANSWER = 0.2

    def come_back(self) -> None:
        self.answers.set()
        saves._ANSWER = 60.0
        while self.stopped:
            with suppress(ProcessLookupError):  # it was given up
                os.kill(self.stopped.pop(), signal.SIGCONT)


class Hangs(pl.Callback):
    """The mount hangs from steps to others; while it does not, each save is published before the next step."""

    def __init__(self, mount: Mount, *, begin: tuple[int, ...], end: tuple[int, ...]) -> None:
        self.mount, self.begin, self.end = mount, begin, end

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step in self.end:
            self.mount.come_back()
            for thread in self.mount.waited:
                thread.join(60)
        if trainer.global_step in self.begin:
            self.mount.hang()
        end = time.monotonic() + 30
        while self.mount.answers.is_set() and trainer.checkpoint_callback.busy and time.monotonic() < end:
            trainer.checkpoint_callback._poll(trainer)
            time.sleep(0.01)


@pytest.fixture
def mount(tmp_path, monkeypatch):
    mount = Mount(tmp_path, monkeypatch)
    yield mount
    mount.come_back()


def train_and_skip(directory, hangs):
    """Saves each second step of 14, or skips it; the thread that trains waits for no answer of the mount."""
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=directory, filename="{step}", every_n_train_steps=2, save_top_k=-1, async_save=True,
        on_busy="skip",
    )  # fmt: skip
    quiet_trainer(max_steps=14, callbacks=[hangs, ckpt], logger=False).fit(ToyModel(), loader())
    assert threading.main_thread() not in hangs.mount.waited


@pytest.mark.parametrize(
    ("begin", "end", "skipped"),
    [((3,), (9,), {4, 6, 8}), ((4,), (9,), {6, 8}), ((3, 5), (5, 9), {4, 6, 8})],
    ids=["between_two_saves", "while_one_is_written", "again_after_an_answer"],
)
def test_saves_are_skipped_while_the_disk_hangs(tmp_path, mount, begin, end, skipped, caplog):
    """Before and while one is written: no step waits for what only the disk can answer."""
    train_and_skip(tmp_path, Hangs(mount, begin=begin, end=end))
    assert {m.step for m in manifests(tmp_path).values()} == set(range(2, 15, 2)) - skipped
    assert all(f"step {step} is not saved" in caplog.text for step in skipped)
    assert all(problems(tmp_path / name) == [] for name in names(tmp_path) if name.startswith("step"))


class Impatient(Hangs):
    """What does not move while the mount hangs is given up at once."""

    def on_train_batch_start(self, trainer, *args):
        super().on_train_batch_start(trainer, *args)
        in_flight.STALLED = 600.0 if self.mount.answers.is_set() else 0.0


def test_what_was_being_written_is_given_up_without_the_disk(tmp_path, mount, monkeypatch, caplog):
    """To remove what there is of it is for when the disk is back."""
    monkeypatch.setattr(saves, "_ANSWER", 0.2)
    monkeypatch.setattr(in_flight, "STALLED", in_flight.STALLED)
    train_and_skip(tmp_path, Impatient(mount, begin=(4,), end=(9,)))
    assert "nothing was written for 0 s: the storage does not answer" in caplog.text
    assert {m.step for m in manifests(tmp_path).values()} == {2, 10, 12, 14}
    assert not [name for name in names(tmp_path) if name.endswith("unfinished") or name == "step=4"]


class Waits(Hangs):
    """Lets the mount answer as soon as the log says ``said``."""

    def __init__(self, mount: Mount, said: str, caplog: pytest.LogCaptureFixture) -> None:
        super().__init__(mount, begin=(3,), end=())
        self.watch = threading.Thread(target=self._come_back, args=(said, caplog))
        self.said = False

    def _come_back(self, said: str, caplog: pytest.LogCaptureFixture) -> None:
        end = time.monotonic() + 30
        while not self.said and time.monotonic() < end:
            self.said = said in caplog.text
            time.sleep(0.01)
        self.mount.come_back()

    def on_train_start(self, *args):
        self.watch.start()

    def on_train_end(self, *args):
        self.watch.join()


@pytest.mark.parametrize("beside", [False, True])
def test_who_waits_for_the_disk_says_so(tmp_path, mount, beside, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    waits = Waits(mount, "training waits for its disk to answer", caplog)
    ckpt = ModelCheckpoint(
        monitor=None, dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, async_save=beside
    )
    quiet_trainer(max_steps=8, callbacks=[waits, ckpt], logger=False).fit(ToyModel(), loader())
    assert waits.said
    assert {m.step for m in manifests(tmp_path).values()} == {2, 4, 6, 8}
