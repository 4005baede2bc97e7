"""Ranks that Lightning forks, as in a notebook with several devices, while the process that was there waits for them."""

from __future__ import annotations

import textwrap

import pytest
from processes import python

SCRIPT = """
    import multiprocessing, os, signal, sys, time
    import nemologger as nl
    from toy import ToyModel, loader, quiet_trainer

    class Interrupts(ToyModel):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and self.global_step == 4:
                os.kill(os.getppid(), signal.SIGINT)  # to nobody else
            time.sleep(0.2)
            return super().training_step(batch, batch_idx)

    ckpt = nl.ModelCheckpoint(dirpath=sys.argv[1], filename="{step}", monitor=None, every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=1000, max_epochs=-1, devices=2, strategy="ddp_fork", callbacks=[ckpt])
    try:
        trainer.fit(Interrupts(), loader())
    except SystemExit:
        print("LEFT", len(multiprocessing.active_children()))
"""


@pytest.mark.dist
def test_ctrl_c_that_only_the_waiting_process_hears_ends_the_ranks_too(tmp_path):
    """The next cell that trains would be refused, as long as they have the directory."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = python(script, tmp_path / "checkpoints", check=False, timeout=120)
    assert "LEFT 0" in done.stdout, done.stdout + done.stderr
    assert "stopped by Ctrl-C; the newest checkpoint is" in done.stderr
