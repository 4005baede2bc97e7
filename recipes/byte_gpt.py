"""Pretrain a small GPT on the Python standard library's source.

    python recipes/byte_gpt.py                   # train; about a minute on two cores
    python recipes/byte_gpt.py --max-steps 1000  # go on from the last checkpoint

Stop it at any time, with Ctrl-C or worse, and run the same command again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

import fiddle as fdl
import torch
from byte_gpt_model import ByteGPT
from lightning.pytorch import loggers as pl_loggers
from source_text import SourceText

import nemologger as nl


def pretrain_recipe(
    name: str = "byte_gpt",
    dir: str | None = None,  # the name that NeMo's recipes use
    max_steps: int = 400,
    val_check_interval: int = 100,
    batch_size: int = 16,
    devices: int = 1,
) -> fdl.Partial[nl.train]:
    """The whole run as a configuration: print it, change it, then build and call it.

    Args:
        name: The experiment; its directory is ``<dir>/<name>``.
        dir: Where experiments go; default ``./nemo_experiments``.
        max_steps: Optimizer steps in all, over all lives of the run.
        val_check_interval: Validate and save every so many steps.
        batch_size: Windows of 128 bytes per step and device.
        devices: Processes that train together (DDP) if more than 1.
    """
    return fdl.Partial(
        nl.train,
        model=fdl.Config(ByteGPT),
        data=fdl.Config(SourceText, batch_size=batch_size),
        trainer=fdl.Config(
            nl.Trainer,
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            max_steps=max_steps,
            val_check_interval=val_check_interval,
            check_val_every_n_epoch=None,
            log_every_n_steps=5,
        ),
        log=nl.default_log(
            dir=dir,
            name=name,
            tensorboard_logger=nl.tensorboard_logger(name),
            every_n_train_steps=val_check_interval,
            save_top_k=2,
            filename="{model_name}--{val_loss:.4f}-{epoch}-{step}-{consumed_samples}",
        ),
        resume=nl.default_resume(),
    )


def report(trainer: nl.Trainer, model: ByteGPT) -> None:
    """Say where everything is, and what the model writes."""
    run = nl.run_of(trainer)
    checkpoint = trainer.checkpoint_callback
    if run is None or not trainer.is_global_zero:
        return
    print(f"\nrun directory    {run.log_dir}")
    print(f"best checkpoint  {checkpoint.best_model_path or 'none yet'}")
    print(f"last checkpoint  {checkpoint.last_model_path or 'none yet'}")
    for logger in trainer.loggers:
        if isinstance(logger, pl_loggers.TensorBoardLogger):
            curves = [sys.executable, "-m", "tensorboard.main", "--logdir", str(Path(logger.log_dir).resolve())]
            print(f"curves           {shlex.join(curves)}")
    print(f"\nThe model writes:\n\n{model.sample()}")


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="byte_gpt", help="the experiment (default: %(default)s)")
    parser.add_argument("--dir", default=None, help="where experiments go (default: ./nemo_experiments)")
    parser.add_argument("--max-steps", type=int, default=400, help="optimizer steps in all (default: %(default)s)")
    parser.add_argument("--val-check-interval", type=int, default=100, help="validate and save every so many steps")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step and device")
    parser.add_argument("--devices", type=int, default=1, help="processes that train together")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("nemologger").setLevel(logging.INFO)
    torch.manual_seed(0)

    recipe = pretrain_recipe(**vars(parser.parse_args()))
    run = fdl.build(recipe)
    run(task_config=recipe)
    report(run.keywords["trainer"], run.keywords["model"])


if __name__ == "__main__":
    main()
