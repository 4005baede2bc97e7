"""A training script that can be told to stop: ``train_stopped.py DIRECTORY STEPS [--option value ...]``.

Beside ``losses-<rank>.txt`` (see ``train_toy.py``) it writes ``pid-<rank>`` when training starts, ``validating-<rank>`` when
a validation starts, ``val.txt`` with a line per validation, and ``after-<rank>`` with what was seen after ``fit``.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from toy import quiet_trainer
from train_toy import Forgetful, Shuffled, WriteLosses

import nemologger as nl
from nemologger.callbacks import MaxTimePerRun, PreemptionCallback


class Notes(pl.Callback):
    """Tells the test where the run is."""

    def __init__(self, directory: Path, val_pause: float) -> None:
        self.directory, self.val_pause = directory, val_pause

    def on_train_start(self, trainer, pl_module):
        (self.directory / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_validation_start(self, trainer, pl_module):
        (self.directory / f"validating-{trainer.global_rank}").touch()
        time.sleep(self.val_pause)

    def on_validation_end(self, trainer, pl_module):
        (self.directory / f"validating-{trainer.global_rank}").unlink()
        if trainer.is_global_zero:
            with (self.directory / "val.txt").open("a") as file:
                file.write(f"{trainer.global_step} {float(trainer.callback_metrics['val_loss'])!r}\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--every", type=int, default=1000, help="steps between saves")
    parser.add_argument("--validate", type=int, default=5, help="batches between validations")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of the loader that is trained from")
    parser.add_argument("--start", help="how those workers start")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--val-pause", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--beside", action="store_true", help="async_save")
    parser.add_argument("--no-last", action="store_true")
    parser.add_argument("--by-itself", action="store_true", help="leave SIGTERM to ModelCheckpoint")
    parser.add_argument("--sig", type=int)
    parser.add_argument("--exit-code", type=int)
    parser.add_argument("--max-time", type=float, help="seconds, instead of a signal")
    parser.add_argument("--epochs", action="store_true", help="STEPS are epochs, with a validation at the end of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method(options.start, force=True)
    options.directory.mkdir(parents=True, exist_ok=True)
    before = signal.getsignal(signal.SIGTERM)
    stop = (
        PreemptionCallback(options.sig, options.exit_code)
        if options.max_time is None
        else MaxTimePerRun({"seconds": options.max_time})
    )
    limits = {"max_steps": options.steps, "val_check_interval": options.validate}
    if options.epochs:
        limits = {"max_epochs": options.steps, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    trainer = quiet_trainer(
        **limits,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        # In front of the others: it finds its place.
        callbacks=[
            *([] if options.by_itself else [stop]),
            WriteLosses(options.directory, options.pause),
            Notes(options.directory, options.val_pause),
        ],
        use_distributed_sampler=False,
        accumulate_grad_batches=options.accumulate,
    )
    ckpt = nl.ModelCheckpoint(
        filename="{step}",
        every_n_train_steps=options.every,
        save_top_k=2,
        async_save=options.beside,
        save_last=not options.no_last,
    )
    try:
        nl.train(
            Forgetful(),
            Shuffled(options.workers),
            trainer,
            nl.NeMoLogger(name="toy", log_dir=options.directory, ckpt=ckpt),
            nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
        )
    finally:
        restored = signal.getsignal(signal.SIGTERM) is before
        reached = getattr(stop, "reached", None)
        note = f"{trainer.global_step} restored={restored} reached={reached} ckpt_path={trainer.ckpt_path}"
        (options.directory / f"after-{trainer.global_rank}").write_text(note)


if __name__ == "__main__":
    main()
