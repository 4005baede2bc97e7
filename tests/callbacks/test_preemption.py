"""A signal to any rank: saved, stopped, and gone on with as if nothing had happened."""

from __future__ import annotations

import csv
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers.disks import FailingDisk
from helpers.stopped import Run, Watch
from lightning.pytorch.callbacks import Callback
from processes import free_port, python, started, torchrun, wait_for
from torch.utils.data import DataLoader
from toy import BATCH, ToyData, ToyDataModule, ToyModel, loader, manifests, names, quiet_trainer

import nemologger as nl
from nemologger.callbacks import PreemptionCallback
from nemologger.checkpoint.verify import problems
from nemologger.errors import ConfigurationError
from nemologger.trackers import CSVLogger

SCRIPT = Path(__file__).parents[1] / "train_stopped.py"
AGENT = SCRIPT.with_name("agent.py")
EPOCHS = {"max_epochs": 3, "max_steps": -1, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}


@pytest.mark.parametrize(
    "ckpt",
    [
        {},
        {"async_save": True},
        {"async_save": True, "every_n_train_steps": 1},
        {"every_n_train_steps": 7},
        {"save_last": False},
        {"save_last": "link"},
        {"save_optim_on_train_end": False},
    ],
)
def test_the_next_run_goes_on_from_the_very_step(tmp_path, ckpt):
    run = Run(tmp_path, ckpt=ckpt)
    assert run.train(PreemptionCallback(), watch=Watch("batch", 6)) == 143
    assert len(run.losses) == 7
    kept = manifests(run.checkpoints)
    assert max(manifest.step for manifest in kept.values()) == 7
    assert all(problems(run.checkpoints / name) == [] for name in kept)
    run.goes_on(PreemptionCallback())
    kept = manifests(run.checkpoints)
    assert len(kept) <= 3  # what was there only for the way on is gone
    assert max(manifest.step for manifest in kept.values()) == 20


@pytest.mark.parametrize("batch", [5, 6, 7, 9, 10])
def test_gradients_that_are_being_accumulated_are_not_lost(tmp_path, batch):
    run = Run(tmp_path, trainer={"accumulate_grad_batches": 3, "max_steps": 8, "val_check_interval": 4})
    assert run.train(PreemptionCallback(), watch=Watch("batch", batch)) == 143
    # ten batches an epoch, the last one is stepped alone
    assert len(run.losses) == {5: 6, 6: 9, 7: 9, 9: 10, 10: 13}[batch]
    run.goes_on()


def test_a_signal_during_validation_waits_for_its_end(tmp_path):
    run = Run(tmp_path)
    assert run.train(PreemptionCallback(), watch=Watch("validation", 5)) == 143
    assert len(run.losses) == 5
    assert [step for step, _ in run.validations] == [5]
    run.goes_on()


def test_a_validation_that_is_due_is_not_left_out(tmp_path):
    run = Run(tmp_path)
    assert run.train(PreemptionCallback(), watch=Watch("batch", 4)) == 143
    assert len(run.losses) == 5
    assert [step for step, _ in run.validations] == [5]
    run.goes_on()


def test_validation_in_the_middle_of_accumulation_is_no_boundary(tmp_path):
    run = Run(tmp_path, trainer={"accumulate_grad_batches": 2, "max_steps": 8, "val_check_interval": 3})
    assert run.train(PreemptionCallback(), watch=Watch("validation", 1)) == 143
    assert len(run.losses) == 4
    run.goes_on()


@pytest.mark.parametrize("where", [("batch", 9), ("validation", 10), ("batch", 10), ("batch", 19)])
def test_at_the_ends_of_epochs(tmp_path, where):
    run = Run(tmp_path, trainer=EPOCHS)
    assert run.train(PreemptionCallback(), watch=Watch(*where)) == 143
    assert len(run.losses) == {"batch": where[1] + 1, "validation": 10}[where[0]]
    run.goes_on()


def test_an_epoch_that_is_trained_is_ended_first(tmp_path):
    ended = []

    class Ends(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ended.append(trainer.current_epoch)

    run = Run(tmp_path, trainer={**EPOCHS, "limit_val_batches": 0}, ckpt={"monitor": None}, callbacks=lambda: [Ends()])
    assert run.train(PreemptionCallback(), watch=Watch("batch", 9)) == 143
    assert ended == [0]
    run.goes_on()
    assert ended == [0, *range(3), 1, 2]  # the run in one piece comes in between


def test_a_signal_during_the_sanity_check_stops_after_the_first_step(tmp_path):
    run = Run(tmp_path, trainer={"num_sanity_val_steps": 1})
    assert run.train(PreemptionCallback(), watch=Watch("sanity check", 0)) == 143
    assert len(run.losses) == 1
    run.goes_on()


def test_the_last_step_before_the_stop_is_logged_too(tmp_path):
    run = Run(tmp_path, trainer={"limit_val_batches": 0, "log_every_n_steps": 1}, ckpt={"monitor": None})
    run.trainer["logger"] = [CSVLogger()]
    assert run.train(PreemptionCallback(), watch=Watch("batch", 6)) == 143
    run.trainer["logger"] = [CSVLogger()]
    run.train()
    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(20))


def test_again_and_again(tmp_path):
    run = Run(tmp_path, ckpt={"async_save": True, "every_n_train_steps": 3})
    for batch in (2, 3, 9, 15):
        assert run.train(PreemptionCallback(), watch=Watch("batch", batch, times=3)) == 143
    assert len(run.losses) == 16
    run.goes_on()


def test_what_other_callbacks_do_after_the_step_is_saved_with_it(tmp_path):
    class Counts(Callback):
        count = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state_dict):
            self.count = state_dict["count"]

    counts = Counts()
    run = Run(tmp_path, callbacks=lambda: [counts])
    run.train(PreemptionCallback(), watch=Watch("batch", 2))
    counts.count = 0
    run.train()
    assert counts.count == 20
    assert max(manifest.consumed_samples for manifest in manifests(run.checkpoints).values()) == 80


def test_the_exit_code_and_the_signal_are_the_callers(tmp_path):
    run = Run(tmp_path)
    stop = PreemptionCallback(signal.SIGUSR2, exit_code=85)
    assert run.train(stop, watch=Watch("batch", 3, signal.SIGUSR2)) == 85
    assert len(run.losses) == 4
    assert PreemptionCallback().exit_code == 143
    assert PreemptionCallback(signal.SIGUSR1).exit_code == 138


def test_a_run_that_is_over_with_this_step_ends_as_usual(tmp_path):
    for number, options in enumerate([{}, EPOCHS]):
        run = Run(tmp_path / str(number), trainer=options)
        last = 29 if options else 19
        trainer = run.train(PreemptionCallback(), watch=Watch("batch", last))
        assert trainer.state.finished
        assert f"step={last + 1}-last" in names(run.checkpoints)
        assert len(run.validations) == (3 if options else 4)


@pytest.mark.parametrize("raises", [False, True])
def test_the_handler_is_restored(raises):
    class Looks(Callback):
        seen: object = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen = signal.getsignal(signal.SIGTERM)
            if raises:
                raise KeyError("an error of the user")

    def mine(signum, frame):
        raise AssertionError("not now")

    looks, stop = Looks(), PreemptionCallback()
    before = signal.signal(signal.SIGTERM, mine)
    try:
        trainer = quiet_trainer(max_steps=2, callbacks=[looks, stop], enable_checkpointing=False)
        if raises:
            with pytest.raises(KeyError, match="an error of the user"):
                trainer.fit(ToyModel(), loader())
        else:
            trainer.fit(ToyModel(), loader())
        assert looks.seen == stop._receive
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_is_restored_after_a_preemption(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert Run(tmp_path).train(PreemptionCallback(), watch=Watch("batch", 2)) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_checkpoint_callback_it_says_so_and_stops(caplog):
    trainer = quiet_trainer(
        max_steps=9, callbacks=[PreemptionCallback(), Watch("batch", 2)], enable_checkpointing=False
    )
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(ToyModel(), loader(), loader())
    assert stopped.value.code == 143
    assert trainer.global_step == 3
    assert "can stop this run but not save it" in caplog.text


def test_a_save_that_fails_is_an_error_in_the_log_and_the_run_stops_all_the_same(tmp_path, caplog):
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}", disk=FailingDisk(0, only=("write",), forever=True))
    trainer = quiet_trainer(max_steps=9, callbacks=[PreemptionCallback(), Watch("batch", 2), ckpt])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(ToyModel(), loader(), loader())
    assert stopped.value.code == 143
    assert "could not be saved before it stops" in caplog.text
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []


def test_the_context_holds_it(tmp_path, recwarn):
    run = Run(tmp_path, ckpt={"always_save_context": True})
    run.train(PreemptionCallback(signal.SIGTERM, 85), watch=Watch("batch", 2))
    assert not [str(w.message) for w in recwarn if "PreemptionCallback" in str(w.message)]
    assert "PreemptionCallback" in (run.checkpoints / "step=3-last" / "context" / "io.json").read_text()


# --- added by ModelCheckpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ckpt", [{}, {"async_save": True, "every_n_train_steps": 6}])
def test_a_checkpoint_callback_is_enough(tmp_path, ckpt):
    run = Run(tmp_path, ckpt=ckpt)
    assert run.train(watch=Watch("batch", 6)) == 143
    assert max(manifest.step for manifest in manifests(run.checkpoints).values()) == len(run.losses) == 7
    run.goes_on()


def test_it_stops_without_a_save_if_that_is_wished(tmp_path, caplog):
    run = Run(tmp_path, ckpt={"save_on_sigterm": False, "every_n_train_steps": 4, "async_save": True})
    assert run.train(watch=Watch("batch", 6)) == 143
    assert len(run.losses) == 7
    assert {manifest.step for manifest in manifests(run.checkpoints).values()} == {4}
    assert "signal SIGTERM: this run stops at step 7" in caplog.text


@pytest.mark.parametrize(("given", "added"), [(signal.SIGTERM, 0), (signal.SIGUSR2, 1)])
def test_it_is_added_to_those_of_other_signals(tmp_path, given, added):
    run = Run(tmp_path)
    stop = PreemptionCallback(given, exit_code=85)
    assert run.train(stop, watch=Watch("batch", 2, given)) == 85
    assert run.train(stop, watch=Watch("batch", 3)) == (143 if added else 85)


def test_weights_alone_are_not_saved_for_a_signal(tmp_path, caplog):
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, every_n_train_steps=100, save_last=False)
    trainer = quiet_trainer(max_steps=9, callbacks=[ckpt, Watch("batch", 2)])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(ToyModel(), loader(), loader())
    assert (stopped.value.code, trainer.global_step) == (143, 3)
    assert [name for name in names(tmp_path) if not name.startswith(".")] == []
    assert "can stop this run but not save it" not in caplog.text


def test_a_handler_that_was_there_is_called_too_and_comes_back(tmp_path):
    seen: list[int] = []

    def mine(signum, frame):
        seen.append(signum)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        run = Run(tmp_path)
        assert run.train(watch=Watch("batch", 6)) == 143
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert max(manifest.step for manifest in manifests(run.checkpoints).values()) == 7


@pytest.mark.parametrize("given", [True, False])
def test_a_signal_while_data_are_loaded_stops_after_the_first_step(tmp_path, given):
    class Late(ToyDataModule):
        def train_dataloader(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().train_dataloader()

    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=100)
    trainer = quiet_trainer(max_steps=9, callbacks=[ckpt, *[PreemptionCallback()] * given])
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(ToyModel(), Late())
    assert stopped.value.code == 143
    assert max(manifest.step for manifest in manifests(tmp_path).values()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sig": 4711}, "no such signal"),
        ({"sig": signal.SIGKILL}, "no process can handle this signal"),
        ({"exit_code": 256}, "expected 0 to 255"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        PreemptionCallback(**arguments)


# --- processes of their own -------------------------------------------------------------------------------------------


def lines(directory: Path, rank: int = 0) -> list[str]:
    """The lines ``step loss`` of a rank."""
    path = directory / f"losses-{rank}.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_killed_after_the_grace_period_nothing_published_is_lost(tmp_path):
    """No boundary comes in time: the steps since the last save are lost, what was published is not."""
    options = ("--every", 2, "--validate", 7, "--beside")
    with started(SCRIPT, tmp_path, 20, "--val-pause", 60, *options) as process:
        wait_for((tmp_path / "validating-0").exists)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    checkpoints = tmp_path / "toy" / "checkpoints"
    whole = [path for path in checkpoints.iterdir() if (path / "manifest.json").exists()]
    assert whole
    assert all(problems(path) == [] for path in whole)
    python(SCRIPT, tmp_path, 20, *options)
    losses: dict[str, str] = {}
    for line in lines(tmp_path):
        step, loss = line.split()
        assert losses.setdefault(step, loss) == loss
    assert len(losses) == 20


@pytest.mark.dist
@pytest.mark.parametrize(("devices", "start"), [(1, "fork"), (2, "fork"), (1, "forkserver")])
def test_all_processes_of_the_job_get_the_signal(tmp_path, devices, start):
    """Workers of data loaders, the server that starts them, and writers too: training goes on to the end of the step."""
    options = ("--devices", devices, "--workers", 2, "--start", start, "--pause", 0.1, "--beside", "--every", 1)
    with started(SCRIPT, tmp_path, 3000, *options) as process:
        wait_for(lambda: len(lines(tmp_path, devices - 1)) >= 6)
        main = psutil.Process(process.pid)
        for one in (*main.children(recursive=True), main):  # as Slurm does, whatever sessions they are in
            one.send_signal(signal.SIGTERM)
            time.sleep(0.1 if start == "forkserver" else 0)  # a server that hears it is gone when its workers are told
        output = process.stdout.read()
        assert process.wait(timeout=60) == 143
    assert "has died" not in output
    taken = len(lines(tmp_path))
    assert 6 <= taken < 3000
    assert f"step={taken}-last" in names(tmp_path / "toy" / "checkpoints")


def test_loaders_are_given_back(tmp_path):
    data = DataLoader(ToyData(), batch_size=BATCH, num_workers=1)
    checkpoint = nl.ModelCheckpoint(dirpath=tmp_path, monitor=None)
    quiet_trainer(max_steps=3, callbacks=[PreemptionCallback(), checkpoint]).fit(ToyModel(), data, data)
    assert data.worker_init_fn is None


TWO = ("--devices", 2, "--beside", "--every", 4)


@pytest.mark.parametrize("callbacks", [(), (PreemptionCallback(),)], ids=["by itself", "asked for"])
def test_a_run_in_a_thread_hears_no_signal_says_so_and_goes_on(tmp_path, callbacks):
    """Ray trains so, and some notebooks do."""
    run = Run(tmp_path, ckpt={"every_n_train_steps": 3, "async_save": True}, trainer={"max_steps": 7})
    thread = threading.Thread(target=run.train, args=callbacks)
    thread.start()
    thread.join()
    (text,) = (path.read_text() for path in (tmp_path / "toy").glob("nemo_log*"))
    level = "WARNING" if callbacks else "INFO"
    assert len(re.findall(f" {level} .* SIGTERM is not listened to", text)) == 1
    run.trainer = {}
    run.goes_on()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Where two ranks that nobody stopped have written."""
    directory = tmp_path_factory.mktemp("straight")
    torchrun(SCRIPT, 2, directory, 20, *TWO)
    return directory


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_gets_the_signal(tmp_path, straight, rank):
    """Both stop after the same step, whoever started them and with no callback but ModelCheckpoint, and go on together."""
    options = (*TWO, *["--by-itself"] * rank)
    launcher = [AGENT, "--nproc-per-node=2", f"--master-port={free_port()}"] if rank else []
    with started(*launcher, SCRIPT, tmp_path, 20, "--pause", 0.4, *options) as process:
        wait_for(lambda: len(lines(tmp_path, 1)) >= 6)
        os.kill(int((tmp_path / f"pid-{rank}").read_text()), signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == (1 if rank else 143)  # torchrun has an exit code of its own
    taken = lines(tmp_path), lines(tmp_path, 1)
    assert 6 <= len(taken[0]) == len(taken[1]) < 20
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert f"step={len(taken[0])}-last" in names(checkpoints)
    for r in (0, 1):
        assert "restored=True" in (tmp_path / f"after-{r}").read_text()
    torchrun(SCRIPT, 2, tmp_path, 20, *options)
    assert [lines(tmp_path, r) for r in (0, 1)] == [lines(straight, r) for r in (0, 1)]
    assert (tmp_path / "val.txt").read_text() == (straight / "val.txt").read_text()
