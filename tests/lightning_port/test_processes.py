"""The processes of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from processes import python
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port
from nemologger.ranks import SingleProcess


def test_sigterm_reaches_the_receiver_instead_of_lightning_and_the_handler_that_was_there():
    class Sends(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            self.undo = lightning_port.on_sigterm(trainer, lambda number, frame: received.append(number))

        def on_train_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

        def teardown(self, trainer, pl_module, stage):
            self.undo()

    received, earlier = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: earlier.append(number))
    try:
        trainer = quiet_trainer(max_steps=1, callbacks=[Sends()], enable_checkpointing=False)
        trainer.fit(ToyModel(), loader())
        assert received == earlier == [signal.SIGTERM]
        assert trainer.state.finished
        assert not trainer.received_sigterm
        trainer._signal_connector.register_signal_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.received_sigterm, "Lightning's own is back"
        assert received == [signal.SIGTERM]
        trainer._signal_connector.teardown()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_is_as_patient_as_its_strategy_was_told():
    for kind in (DDPStrategy, FSDPStrategy, ModelParallelStrategy):
        trainer = SimpleNamespace(strategy=kind(timeout=timedelta(hours=3)))
        assert lightning_port.patience(trainer) == timedelta(hours=3)
    assert lightning_port.patience(quiet_trainer()) == timedelta(minutes=30)


@pytest.mark.parametrize("let", [True, False])
def test_processes_that_end_together_are_not_killed_for_it(let):
    main = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(143)"])
    observer = _ChildProcessObserver(main_pid=main.pid, child_processes=[other], sleep_period=1)
    try:
        observer.start()
        if let:
            lightning_port.let_processes_end()
        other.wait()
        observer.join(timeout=120)
        assert not observer.is_alive()
        if not let:
            main.wait(timeout=60)
        assert main.poll() == (None if let else -signal.SIGKILL)
    finally:
        main.kill()
        main.wait()


def test_one_process_needs_nobody():
    assert lightning_port.ranks_before_fit(quiet_trainer()) == SingleProcess()


def test_rank_zeros_decisions_travel_by_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    trainer = quiet_trainer(devices=2, strategy="ddp")
    assert isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    ranks = lightning_port.ranks_before_fit(trainer)
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    assert ranks.broadcast("second") == "second"
    monkeypatch.setenv("LOCAL_RANK", "1")  # as in the process that Lightning starts now
    launched = lightning_port.ranks_before_fit(trainer)
    assert launched.world_size == 2
    assert launched.broadcast(None) == {"a": 1}
    assert launched.broadcast(None) == "second"
    lightning_port.forget_decisions()


PROGRAM = """
import sys
import nemologger as nl
from toy import BATCH, ToyData, ToyModel, quiet_trainer
from torch.utils.data import DataLoader

data = DataLoader(ToyData(), batch_size=BATCH, num_workers=1, multiprocessing_context="spawn")
saves = nl.ModelCheckpoint(every_n_train_steps=2, monitor=None)
log = nl.NeMoLogger(log_dir=sys.argv[1], name="run", tensorboard=None, ckpt=saves)
resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
nl.train(ToyModel(), data, quiet_trainer(max_steps=4), log, resume)
"""


def test_a_worker_that_imports_a_program_without_a_guard_says_so(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = python(tmp_path / "program.py", tmp_path, light=False, check=False)
    assert done.returncode
    assert 'below a line `if __name__ == "__main__":`' in done.stderr
    assert "another run is writing" not in done.stderr
