"""A training script for a job of Slurm: ``train_requeued.py HOW DIRECTORY``; see ``test_requeue.py``.

It writes ``losses-<rank>.txt``. In front of a step, in ``SIGNAL_AT``, a rank, in ``SIGNAL_TO``, gets the
signal, or those of ``SIGNALS``, with all that it has started.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import psutil
import torch
from toy import quiet_trainer
from train_toy import Forgetful, Shuffled, WriteLosses

import nemologger as nl
from nemologger.exp_manager import exp_manager

STEPS = 12


class Sends(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        now = (str(trainer.global_step), str(trainer.global_rank))
        if now == (os.environ.get("SIGNAL_AT"), os.environ.get("SIGNAL_TO", "0")):
            me = psutil.Process()
            for process in (*me.children(recursive=True), me):
                for name in os.environ.get("SIGNALS", "SIGUSR1").split():
                    process.send_signal(signal.Signals[name])


def main(how: str, directory: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
    devices = int(os.environ.get("SLURM_NTASKS", "1"))
    options = {
        "max_steps": STEPS, "max_epochs": -1, "val_check_interval": 5, "devices": devices, "accelerator": "cpu",
        "strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "callbacks": [WriteLosses(directory, 0.0), Sends()],
    }  # fmt: skip
    model, data = Forgetful(), Shuffled(1)
    arguments = {"filename": "{step}", "every_n_train_steps": 4, "async_save": True}
    if how == "plain":
        options["callbacks"].append(nl.ModelCheckpoint(dirpath=directory / "checkpoints", **arguments))
        pl.Trainer(**options).fit(model, data)
    elif how == "exp_manager":
        trainer = pl.Trainer(enable_checkpointing=False, **options)
        callback = {"monitor": "val_loss", **arguments}
        exp_manager(
            trainer,
            {"exp_dir": str(directory), "create_tensorboard_logger": False, "checkpoint_callback_params": callback},
        )
        trainer.fit(model, data)
    else:
        log = nl.NeMoLogger(name="toy", log_dir=directory, ckpt=nl.ModelCheckpoint(**arguments))
        nl.train(model, data, quiet_trainer(**options), log)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
