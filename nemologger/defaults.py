"""Parts of a recipe, as fiddle configurations to start from and change."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemologger.logger import NeMoLogger
from nemologger.model_checkpoint import ModelCheckpoint
from nemologger.resume import AutoResume


def tensorboard_logger(name: str, save_dir: str = "tb_logs") -> fdl.Config[TensorBoardLogger]:
    """TensorBoard curves under ``<log_dir>/<save_dir>/<name>``.

    Example:
        >>> tensorboard_logger("demo").save_dir
        'tb_logs'
    """
    return fdl.Config(TensorBoardLogger, save_dir=save_dir, name=name)


def wandb_logger(project: str, name: str, entity: str | None = None) -> fdl.Config[WandbLogger]:
    """A Weights & Biases run called ``name`` in ``project``, of ``entity`` if given.

    Example:
        >>> wandb_logger("language", "demo").project
        'language'
    """
    config = fdl.Config(WandbLogger, project=project, name=name, config={})
    if entity is not None:
        config.entity = entity
    return config


def default_log(
    dir: str | None = None,  # the name that NeMo's recipes use
    name: str = "default",
    tensorboard_logger: fdl.Config[TensorBoardLogger] | None = None,
    wandb_logger: fdl.Config[WandbLogger] | None = None,
    **ckpt: Any,
) -> fdl.Config[NeMoLogger]:
    """Where a run writes, with checkpoints every 200 steps: the best 10 by ``val_loss``, and the last.

    Args:
        dir: The experiments directory; default ``./nemo_experiments``.
        name: The experiment.
        tensorboard_logger: From :func:`tensorboard_logger`, or none.
        wandb_logger: From :func:`wandb_logger`, or none.
        **ckpt: Arguments of :class:`~nemologger.ModelCheckpoint` to set otherwise.

    Example:
        >>> default_log(name="demo", save_top_k=2).ckpt.save_top_k
        2
    """
    settings: dict[str, Any] = {
        "save_last": True,
        "save_top_k": 10,
        "every_n_train_steps": 200,
        "filename": "{model_name}--{val_loss:.2f}-{step}-{consumed_samples}",
        **ckpt,
    }
    return fdl.Config(
        NeMoLogger,
        ckpt=fdl.Config(ModelCheckpoint, **settings),
        name=name,
        tensorboard=tensorboard_logger,
        wandb=wandb_logger,
        log_dir=dir,
    )


def default_resume(resume_if_exists: bool = True, resume_ignore_no_checkpoint: bool = True) -> fdl.Config[AutoResume]:
    """Go on if the run has a checkpoint, else start it.

    Example:
        >>> default_resume().resume_if_exists
        True
    """
    return fdl.Config(
        AutoResume,
        resume_if_exists=resume_if_exists,
        resume_ignore_no_checkpoint=resume_ignore_no_checkpoint,
    )
