"""A script for tests of sweeps: its configuration says what it does. The diary in a run's directory says what was done."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import nemologger as nl


def train(cfg: Any) -> float:
    """Train the toy model; Lightning is imported only now, since most tests need none."""
    import torch
    from sweep_model import Diary, SteppedModel
    from toy import ToyDataModule, quiet_trainer

    torch.set_num_threads(1)
    trainer = quiet_trainer(
        max_steps=cfg.trainer.max_steps,
        devices=cfg.trainer.devices,
        strategy="ddp" if cfg.trainer.devices > 1 else "auto",
        val_check_interval=1,
        callbacks=[Diary(cfg.pause)],
    )
    ckpt = nl.ModelCheckpoint(filename="{step}", every_n_train_steps=1)
    log = nl.NeMoLogger(name="toy", log_dir=cfg.dir, version=cfg.version, ckpt=ckpt)
    resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
    nl.train(SteppedModel(cfg.model.lr, cfg.model.width), ToyDataModule(), trainer, log, resume)
    return trainer.global_step + cfg.model.lr


@nl.hydra_runner(config_path="sweep_conf", config_name="toy")
def main(cfg: Any) -> Any:
    job = nl.sweep_job()
    if cfg.diary:
        with Path(cfg.diary).open("a") as file:
            file.write(f"{job.name if job else None}\t{os.getcwd()}\t{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    time.sleep(0 if cfg.train else cfg.pause)
    if cfg.crash == "raise" or cfg.crash == cfg.model.width:
        raise ValueError(f"cannot work with width {cfg.model.width}")
    if cfg.crash == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.train:
        return train(cfg)
    return cfg.model.lr


if __name__ == "__main__":
    main()
