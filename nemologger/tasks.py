"""One call that trains: sets up the run directory, finds what to resume from, and fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.compile import from_compiled
from torch.utils.data import Dataset

from nemologger.callbacks.model_transform import ModelTransform
from nemologger.condition import kind_of
from nemologger.context.io_json import load_context
from nemologger.errors import ConfigurationError
from nemologger.lightning_port import callbacks
from nemologger.logger import NeMoLogger
from nemologger.resume import AutoResume, RestoreConfig
from nemologger.run.record import close_log
from nemologger.saving.checks import check_trainer

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from nemologger.run.directory import RunDirectory


log = logging.getLogger(__name__)

_MAKE_LOADER = "for example torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)"


class Connects(Protocol):
    """An optimizer module, as NeMo has them: it puts itself into the model."""

    def connect(self, model: pl.LightningModule) -> None:
        """Make ``model.configure_optimizers`` return this optimizer."""


Optim = Connects | Callable[[Iterable[torch.nn.Parameter]], Any]


def train(
    model: pl.LightningModule | str | Path,
    data: pl.LightningDataModule | Any,
    trainer: pl.Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: Optim | None = None,
    tokenizer: Literal["model", "data"] | Any = None,
    model_transform: Callable[[Any], Any] | None = None,
    task_config: Any = None,
) -> Path:
    """Train ``model`` on ``data``; run again, it goes on where it was.

    Args:
        model: Any LightningModule, or the path of a checkpoint of ours: then its class, arguments and weights come from
            there.
        data: A LightningDataModule or the training dataloader(s).
        trainer: A Lightning Trainer; with ``nemologger.Trainer`` the checkpoints' context also holds its arguments.
        log: Where the run writes and what it saves; default ``NeMoLogger()``.
        resume: What it goes on from; default: always a new run.
        optim: The optimizer, if the model does not configure its own: an object with ``connect(model)``, or a function
            of the parameters.
        tokenizer: Which tokenizer model and data share: ``"model"``, ``"data"``, or one to give to both.
        model_transform: Changes the model before training (for example adds adapters): called with it once,
            before weights are restored; works in place.
        task_config: The fiddle configuration of this very call, for ``task.json``:
            ``fdl.build(recipe)(task_config=recipe)``.

    Returns:
        The experiments directory (``exp_dir``), as NeMo does. The run's own directory is ``run_of(trainer).log_dir``.

    Raises:
        ConfigurationError: If the arguments cannot work together.
        NotFoundError: If ``resume`` found nothing and may not start from scratch.

    Example:
        >>> import nemologger as nl
        >>> def main(model, data):
        ...     return nl.train(
        ...         model, data, nl.Trainer(max_steps=100), nl.NeMoLogger(name="demo", ckpt=nl.ModelCheckpoint()),
        ...         nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
        ...     )
    """
    _check_trainer(trainer)
    _check_optimizer(optim)
    try:
        model, run = _set_up(model, data, trainer, log, resume, tokenizer, model_transform, task_config)
        if optim is not None:
            _use_optimizer(model, optim)
        _fit(trainer, model, data)  # returns at once, with the weights of its checkpoint, if nothing is left to train
    finally:
        close_log(trainer)
    return run.exp_dir


def pretrain(
    model: pl.LightningModule | str | Path,
    data: pl.LightningDataModule | Any,
    trainer: pl.Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: Optim | None = None,
) -> Path:
    """:func:`train` from scratch: a tokenizer that the data has becomes the model's.

    Example:
        >>> pretrain.__name__
        'pretrain'
    """
    tokenizer = "data" if getattr(data, "tokenizer", None) is not None else None
    return train(model, data, trainer, log, resume, optim, tokenizer)


def finetune(
    model: pl.LightningModule | str | Path,
    data: pl.LightningDataModule | Any,
    trainer: pl.Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: Optim | None = None,
    peft: Callable[[Any], Any] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
) -> Path:
    """:func:`train` a model that has weights already: a tokenizer that it has becomes the data's.

    ``peft`` is NeMo's name for a ``model_transform`` that adds adapters; give one of the two.

    Example:
        >>> finetune.__name__
        'finetune'
    """
    if peft is not None and model_transform is not None:
        raise ConfigurationError("finetune(peft=..., model_transform=...): they are the same; give one of them")
    tokenizer = "model" if getattr(model, "tokenizer", None) is not None else None
    return train(model, data, trainer, log, resume, optim, tokenizer, peft or model_transform)


def validate(
    model: pl.LightningModule | str | Path,
    data: pl.LightningDataModule | Any,
    trainer: pl.Trainer,
    log: NeMoLogger | None = None,
    resume: AutoResume | None = None,
    optim: Optim | None = None,
    tokenizer: Literal["model", "data"] | Any = None,
    model_transform: Callable[[Any], Any] | None = None,
) -> Path:
    """Run validation on the checkpoint that ``resume`` finds; arguments and result as :func:`train`.

    ``optim`` has no effect: it is there so that a recipe's arguments fit both.

    Example:
        >>> validate.__name__
        'validate'
    """
    _check_trainer(trainer)
    try:
        model, run = _set_up(model, data, trainer, log, resume, tokenizer, model_transform, None, stage="validate")
        if _is_datamodule(data):
            trainer.validate(model, datamodule=data)
        else:
            trainer.validate(model, dataloaders=data)
    finally:
        close_log(trainer)
    return run.exp_dir


def _check_trainer(trainer: pl.Trainer) -> None:
    check_trainer(trainer, "nemologger.train")
    for callback in callbacks(trainer):
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"Trainer(callbacks=...): one is {kind_of(callback)}, expected Lightning's callbacks"
            )


def _set_up(
    model: pl.LightningModule | str | Path,
    data: Any,
    trainer: pl.Trainer,
    logger: NeMoLogger | None,
    resume: AutoResume | None,
    tokenizer: Any,
    model_transform: Callable[[Any], Any] | None,
    task_config: Any,
    stage: Literal["fit", "validate"] = "fit",
) -> tuple[pl.LightningModule, RunDirectory]:
    logger = NeMoLogger() if logger is None else logger
    resume = AutoResume() if resume is None else resume
    if isinstance(getattr(model, "_orig_mod", None), LightningModule):
        # As fit does: the module, with steps that are compiled.
        model = from_compiled(model)  # type: ignore[arg-type]
    _check_types(model, data, logger, resume, model_transform)
    if isinstance(model, str | Path):
        resume = _with_weights_of(model, resume)
        module: pl.LightningModule = load_context(model, subpath="model")
    else:
        module = model
    _share_tokenizer(module, data, tokenizer)
    run = logger.setup(trainer, resume_if_exists=resume.resume_if_exists, task_config=task_config)
    if model_transform is not None:
        callbacks(trainer).insert(0, ModelTransform(model_transform))
    resume.setup(trainer, module, stage=stage)
    return module, run


def _check_types(model: Any, data: Any, logger: Any, resume: Any, model_transform: Any) -> None:
    for name, value, wanted in (
        ("model", model, (LightningModule, str, Path)),
        ("log", logger, NeMoLogger),
        ("resume", resume, AutoResume),
    ):
        if not isinstance(value, wanted):
            expected = {"model": "a LightningModule or the path of a checkpoint", "log": "a NeMoLogger"}
            raise ConfigurationError(f"{name} is {kind_of(value)}: expected {expected.get(name, 'an AutoResume')}")
    if model_transform is not None and not callable(model_transform):
        raise ConfigurationError(
            f"model_transform (peft) is {kind_of(model_transform)}: expected a function of the model, which changes it"
        )
    if hasattr(data, "prepare_data") and not _is_datamodule(data):  # else Lightning would take it for a dataloader
        raise ConfigurationError(f"data is {kind_of(data)}: expected a LightningDataModule or training dataloaders")
    if data is not None and not _is_datamodule(data) and not _gives_batches(data):
        raise ConfigurationError(
            f"data is {kind_of(data)}: expected a LightningDataModule or a DataLoader, {_MAKE_LOADER}"
        )
    if isinstance(data, Dataset) and not hasattr(data, "__iter__"):  # they may be
        log.warning(
            "data is %s, no DataLoader: each of its samples is taken for a batch. If they are none, give a DataLoader, %s",
            kind_of(data),
            _MAKE_LOADER,
        )


def _fit(trainer: pl.Trainer, model: pl.LightningModule, data: Any) -> None:
    if _is_datamodule(data):
        trainer.fit(model, datamodule=data)
    else:
        trainer.fit(model, train_dataloaders=data)


def _gives_batches(data: Any) -> bool:
    """Whether it may be a loader, or several of them."""
    if isinstance(data, str | Path | type):
        return False
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


def _is_datamodule(data: Any) -> bool:
    return isinstance(data, LightningDataModule)


def _with_weights_of(checkpoint: str | Path, resume: AutoResume) -> AutoResume:
    """``resume``, with the weights of ``checkpoint`` for a run that has none of its own."""
    if resume.restore_config is not None:
        return resume
    found = copy(resume)  # not replace(), which a subclass with arguments of its own does not take
    found.restore_config = RestoreConfig(path=str(checkpoint), load_artifacts=False)
    return found


def _share_tokenizer(model: Any, data: Any, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if isinstance(tokenizer, str):
        if tokenizer not in ("model", "data"):
            raise ConfigurationError(f'tokenizer={tokenizer!r}: give "model", "data", or a tokenizer')
        owner = model if tokenizer == "model" else data
        shared = getattr(owner, "tokenizer", None)
        if shared is None:
            raise ConfigurationError(f'tokenizer="{tokenizer}", but {type(owner).__name__} has no tokenizer')
    else:
        shared = tokenizer
    model.tokenizer = shared
    if data is not None:
        data.tokenizer = shared


def _check_optimizer(optim: Any) -> None:
    if optim is not None and not hasattr(optim, "connect") and not callable(optim):
        raise ConfigurationError(
            f"optim is a {type(optim).__name__}: an object with connect(model) is needed, or a function of the parameters, "
            "for example functools.partial(torch.optim.AdamW, lr=1e-3)"
        )


def _use_optimizer(model: pl.LightningModule, optim: Any) -> None:
    if hasattr(optim, "connect"):
        optim.connect(model)
    else:
        model.configure_optimizers = lambda: optim(model.parameters())  # type: ignore[method-assign]
