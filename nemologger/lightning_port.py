"""The only file that reads or changes what Lightning keeps to itself.

Everything here is used by the floors above through plain values, so that a new Lightning release can break one file and
its test (``tests/test_lightning_port.py``) says which line.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core.hooks import CheckpointHooks
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.constants import default_pg_timeout

from nemologger import sharded_state
from nemologger.ranks import DEFAULT_TIMEOUT, Failure, Ranks, SingleProcess, connect

if TYPE_CHECKING:
    from types import FrameType

    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO

T = TypeVar("T")


# --- state ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint is made of, taken between two steps. The tensors are the live ones.

    Attributes:
        checkpoint: Lightning's checkpoint dictionary: model, loops, callbacks, optimizers, schedulers, hyperparameters.
        parameter_names: The keys of ``checkpoint["state_dict"]`` that are parameters. The others are buffers, which may
            differ between the ranks of data-parallel training.
        optimizer_names: For each optimizer, the parameter name behind each index of its state.
    """

    checkpoint: dict[str, Any]
    parameter_names: frozenset[str]
    optimizer_names: list[dict[int, str]]


class KeepsWeights(Callback):
    """A callback whose ``on_save_checkpoint`` adds weights: it is called for checkpoints of weights alone, too."""


def training_state(trainer: pl.Trainer, *, weights_only: bool) -> TrainingState:
    """Lightning's checkpoint of this moment. Collective: user hooks that run on every rank are called here."""
    with sharded_state.kept_in_place(trainer.strategy):
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
        if weights_only:  # Lightning asks no callback then
            for callback in callbacks(trainer):
                if isinstance(callback, KeepsWeights):
                    callback.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
    return TrainingState(checkpoint, frozenset(_named_parameters(trainer)), optimizer_names(trainer))


def optimizer_names(trainer: pl.Trainer) -> list[dict[int, str]]:
    """For each optimizer, the parameter name behind each index of its state."""
    by_id = {id(parameter): name for name, parameter in reversed(_named_parameters(trainer).items())}
    names = []
    for optimizer in trainer.optimizers:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names.append({i: by_id[id(p)] for i, p in enumerate(parameters) if id(p) in by_id})
    return names


def _named_parameters(trainer: pl.Trainer) -> dict[str, torch.nn.Parameter]:
    named = trainer.lightning_module.named_parameters(remove_duplicate=False)
    return {sharded_state.plain_name(name): parameter for name, parameter in named}


def restore_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Let ``trainer.callback_metrics`` be what they were when a checkpoint was saved.

    A resumed run may end the epoch before it validates again, and early stopping asks for its metric then.
    """
    known = trainer._logger_connector._callback_metrics
    for name, value in metrics.items():
        known.setdefault(name, torch.tensor(value))


def checkpoint_directory(trainer: pl.Trainer, checkpoint: ModelCheckpoint) -> str:
    """Where ``checkpoint`` will write, before a fit has settled it."""
    return str(checkpoint._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


def last_saved(checkpoint: ModelCheckpoint) -> str:
    """The path of the last checkpoint that ``checkpoint`` has saved and that is there; empty if there is none."""
    for path in (checkpoint.last_model_path, checkpoint._last_checkpoint_saved):
        if path and get_filesystem(path).exists(path):  # it may be a URL
            return path
    return ""


def use_checkpoint_io(
    trainer: pl.Trainer, plugin: CheckpointIO, load: Callable[[str | Path], dict[str, Any] | None] | None = None
) -> None:
    """Let the trainer's strategy read and write checkpoints through ``plugin``.

    Args:
        trainer: The trainer.
        plugin: For strategies that use one.
        load: For those that do not, because they restore model and optimizers themselves: does so, and returns Lightning's
            dictionary; or None to leave it to the strategy.
    """
    strategy = trainer.strategy
    strategy.checkpoint_io = plugin
    if load is None or not sharded_state.shards_state(strategy):
        return
    inner = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        loaded = load(checkpoint_path)
        return inner(checkpoint_path, weights_only=weights_only) if loaded is None else loaded

    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def hooks_between_steps(module: pl.LightningModule) -> list[str]:
    """The hooks of ``module`` that run after a checkpoint callback and before the optimizer's next step."""
    between = (
        "on_train_batch_end",
        "on_train_batch_start",
        "on_train_epoch_end",
        "on_train_epoch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
    )
    return [hook for hook in between if is_overridden(hook, module)]


def will_rewrite_state(module: pl.LightningModule) -> bool:
    """Whether loading may legitimately bring other keys than the module has."""
    return not module.strict_loading or is_overridden("on_load_checkpoint", module)


def loads_as_is(trainer: pl.Trainer, module: pl.LightningModule | None) -> bool:
    """Whether the model's state dictionary that a checkpoint plugin returns goes to ``module`` as it is.

    That is: no code but Lightning's and ours gets to see it on its way, or later, which might change it or keep it.
    """
    strategy = trainer.strategy
    if not loads_model_as_is(strategy) or (module is not None and will_rewrite_state(module)):
        return False
    theirs = [
        *(callback.on_load_checkpoint for callback in callbacks(trainer)),
        trainer.precision_plugin.on_load_checkpoint,
        strategy.load_checkpoint,
        strategy.load_optimizer_state_dict,
    ]
    return all(_is_known(method) for method in theirs)


def loads_model_as_is(strategy: Strategy) -> bool:
    """Whether ``strategy`` hands a state dictionary to ``load_state_dict`` of the module, and that is all it does."""
    plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    return plain and getattr(strategy.load_model_state_dict, "__func__", None) is Strategy.load_model_state_dict


def _is_known(method: Any) -> bool:
    """Whether ``method`` is Lightning's that leaves a checkpoint alone, or ours."""
    function = getattr(method, "__func__", None)
    module = getattr(function, "__module__", "")
    return module.startswith("nemologger.") or module in _LEAVE_CHECKPOINTS_ALONE


_LEAVE_CHECKPOINTS_ALONE = (
    Callback.__module__,
    CheckpointHooks.__module__,
    Strategy.__module__,
)


# --- when -------------------------------------------------------------------------------------------------------------


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether validation runs right after the training batch that is ending."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of the batch that is ending are kept for a later optimizer step."""
    return trainer.lightning_module.automatic_optimization and trainer.fit_loop.epoch_loop._should_accumulate()


def epochs_done(trainer: pl.Trainer) -> int:
    """How many epochs have been trained to their last batch."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return int(progress.processed) + int(is_last_batch and progress.processed < progress.started)


class _Behind:
    """What is put in the place of a method that Lightning calls next, once; see :func:`behind_module`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.calls: list[Callable[[], None]] = []
        self.is_calling = False
        self._owner, self._name, self._own, self._plain = vars(owner), name, vars(owner).get(name), getattr(owner, name)
        self._owner[name] = self

    def undo(self) -> None:
        del self._owner[self._name]
        if self._own is not None:
            self._owner[self._name] = self._own

    def __call__(self) -> None:
        self.is_calling = True
        try:
            for call in self.calls:
                call()
        finally:
            self.undo()
        self._plain()


def behind_module(trainer: pl.Trainer, hook: str, call: Callable[[], None]) -> None:
    """For a callback's ``on_train_batch_end`` or ``on_validation_end``: ``call()`` behind the ``hook`` of the module.

    Lightning calls the module's own after those of all callbacks. Several calls are made in the order in which they came
    in; where the module has no such hook of its own, at once. Behind ``on_train_epoch_end`` is when the epoch has been
    ended by everybody: callbacks, schedules, loggers.
    """
    if hook != _EPOCH_END and not is_overridden(hook, trainer.lightning_module):
        call()
        return
    owner, name = _next_after_module(trainer)[hook]
    behind = vars(owner).get(name)
    if not isinstance(behind, _Behind):
        behind = _Behind(owner, name)
    behind.calls.append(call)


def forget_behind_module(trainer: pl.Trainer) -> None:
    """After an exception: make no calls that :func:`behind_module` has put off."""
    for owner, name in _next_after_module(trainer).values():
        behind = vars(owner).get(name)
        if isinstance(behind, _Behind):
            behind.undo()


_EPOCH_END = "on_train_epoch_end"


def _next_after_module(trainer: pl.Trainer) -> dict[str, tuple[Any, str]]:
    """What Lightning calls once both the callbacks and the module have had their turn."""
    return {
        _EPOCH_END: (trainer.fit_loop.epoch_progress, "increment_completed"),
        "on_train_batch_end": (trainer._logger_connector, "on_batch_end"),
        "on_validation_end": (trainer.strategy, "on_validation_end"),
    }


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which saves nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector


def callbacks(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's list of callbacks itself."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector


def callbacks_of_the_program(trainer: pl.Trainer) -> dict[str, object]:
    """The callbacks that are neither Lightning's nor ours, by name."""
    ours = ("lightning.", "nemologger.")
    return {
        f"callback {i} {type(callback).__name__}": callback
        for i, callback in enumerate(c for c in callbacks(trainer) if not type(c).__module__.startswith(ours))
    }


def data_module(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """What the running fit gets its loaders from, if it is one."""
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]  # set by a connector


def saves_itself(data: pl.LightningDataModule) -> bool:
    """Whether ``data`` has state of its own for checkpoints."""
    return is_overridden("state_dict", data)


def saves_more(module: pl.LightningModule) -> bool:
    """Whether ``module`` puts something of its own into checkpoints."""
    return is_overridden("on_save_checkpoint", module)


def names_of_lightning() -> frozenset[str]:
    """The attributes of modules and data modules that are not the program's."""
    hyperparameters = {"_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams"}
    return frozenset({*vars(LightningModule()), *vars(LightningDataModule()), *hyperparameters})


def move_to_end(trainer: pl.Trainer, callback: Callback) -> None:
    """Let ``callback`` act after all others, checkpoints included. For its ``setup``."""
    others = [other for other in callbacks(trainer) if other is not callback]
    trainer.callbacks = [*others, callback]  # type: ignore[attr-defined]  # another list: Lightning iterates over this one


def is_over(trainer: pl.Trainer) -> bool:
    """For ``on_train_batch_end`` and ``on_validation_end``: whether training ends with this batch by itself."""
    max_epochs = trainer.fit_loop.max_epochs
    by_epochs = max_epochs not in (None, -1) and epochs_done(trainer) >= max_epochs
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return by_epochs or by_steps or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def logs_this_batch(trainer: pl.Trainer) -> bool:
    """Whether what is logged in this batch reaches the loggers (``log_every_n_steps``)."""
    return trainer._logger_connector.should_update_logs


def show_metrics(trainer: pl.Trainer, metrics: dict[str, float], *, prog_bar: bool) -> None:
    """Put ``metrics`` where callbacks and the progress bar find them, without loggers.

    A metric that is logged costs time in every step after that, because Lightning goes through all of them.
    """
    connector = trainer._logger_connector
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    connector._callback_metrics.update(values)
    if prog_bar:
        connector._progress_bar_metrics.update(metrics)


def drop_interrupted_validation(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: do not go on with a validation that the checkpoint was saved in the middle of."""
    trainer.fit_loop.epoch_loop.val_loop.reset_restart_stage()


def leave_fit() -> NoReturn:
    """For a hook: end ``fit``, which returns as usual, without the hooks that say that training has ended."""
    raise _TunerExitException


def on_sigterm(trainer: pl.Trainer, receive: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """For ``setup``: have ``receive`` called on SIGTERM where Lightning broadcasts, and return what undoes that.

    Lightning's handler makes a collective call out of whatever is under way, perhaps another collective: the ranks then
    wait for each other for ever, or crash. It is in place from behind ``setup`` to the end of the fit, and calls the one
    that was there before it too.
    """
    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = receive  # type: ignore[method-assign,assignment]
    return lambda: connector.__dict__.pop("_sigterm_notifier_fn", None)


def patience(trainer: pl.Trainer) -> timedelta:
    """How long training waits for another rank, as the strategy was told (``timeout``)."""
    return getattr(trainer.strategy, "_timeout", None) or default_pg_timeout


def connect_as_patiently(trainer: pl.Trainer) -> Ranks:
    """The ranks, for waits in the middle of training: what one of them may take there does not end the run here."""
    return connect(max(DEFAULT_TIMEOUT, patience(trainer)))


def let_processes_end() -> None:
    """Before all ranks exit with a code: let none of them be killed for it.

    Where Lightning has started the other processes, a thread looks after them every few seconds. It kills what is left
    once one of them has ended with another code than 0; this process, too, which may have loggers to close.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether the running fit has a validation step, data for it, and leave to use it."""
    return trainer.enable_validation


def next_logged_step(trainer: pl.Trainer) -> int:
    """The step that a resumed run logs its next batch under, if it is to go on as the uninterrupted one would have.

    For ``on_train_start``. Lightning counts a step after what is logged and saved in it, but for the end of an epoch.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    batches: Any = loop.batch_progress.total
    epochs: Any = fit_loop.epoch_progress.current
    within_batch = batches.completed < batches.processed or epochs.processed < epochs.ready
    return loop._batches_that_stepped + (within_batch and not loop._should_accumulate())


def log_is_due(trainer: pl.Trainer, every: int) -> bool:
    """For ``on_train_batch_end``: whether the batch ends a step that is to be logged, every ``every`` steps."""
    return not is_accumulating(trainer) and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def set_next_logged_step(trainer: pl.Trainer, step: int) -> None:
    """Log the batch that is starting under ``step``."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def logged_step(trainer: pl.Trainer) -> int:
    """The step that Lightning logs the training batch of this moment under."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def at_end_of_backward(loss: torch.Tensor, call: Callable[[], None]) -> None:
    """For ``on_before_backward``: have ``call()`` made when this rank has computed all gradients of ``loss`` itself.

    That is before DistributedDataParallel waits for those of the others: it queues its wait while gradients come in, and
    this is queued before the first of them. On a GPU the work up to there has been launched, and the wait has not.
    """
    engine = torch.autograd.Variable._execution_engine
    if loss.requires_grad:
        loss.register_hook(lambda gradient: engine.queue_callback(call))  # type: ignore[no-untyped-call]


def has_comm_hook(trainer: pl.Trainer) -> bool:
    """Whether gradients are summed over ranks by a hook of the user's."""
    return getattr(trainer.strategy, "_ddp_comm_hook", None) is not None


def data_reader(trainer: pl.Trainer) -> tuple[int, int]:
    """Which of how many different streams of training data this rank sees; tensor-parallel ranks see the same one."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return trainer.global_rank, trainer.world_size
    mesh = trainer.strategy.device_mesh["data_parallel"]
    return mesh.get_local_rank(), mesh.size()


# --- training loaders -------------------------------------------------------------------------------------------------


def wrap_training_loaders(trainer: pl.Trainer, wrap: Callable[[object], object]) -> Callable[[], None]:
    """Let the fit loop have ``wrap(loader)`` for each of its loaders, and return what undoes that.

    ``wrap`` sees them as they will be iterated over: with a distributed sampler, if Lightning has put one in.
    """
    strategy = trainer.strategy
    inner = strategy.process_dataloader

    def process(loader: object) -> object:
        loader = inner(loader)
        return wrap(loader) if trainer.training else loader

    strategy.process_dataloader = process  # type: ignore[method-assign,assignment]
    return lambda: strategy.__dict__.pop("process_dataloader", None)


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders of the fit loop, in a flat list; empty before they are made."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The fit's loaders of validation, in a flat list; empty before they are made."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else combined.flattened


def trains_from(trainer: pl.Trainer, batches: object) -> bool:
    """Whether ``batches`` is an iterator that the fit loop takes its batches from, rather than somebody else."""
    combined = trainer.fit_loop._combined_loader
    own = None if combined is None else combined._iterator
    return own is not None and any(iterator is batches for iterator in own.iterators)


def fetches_ahead(trainer: pl.Trainer) -> bool:
    """Whether the fit loop takes a batch before it trains on the one before, to know which one is the last."""
    fetcher = trainer.fit_loop._data_fetcher
    return isinstance(fetcher, _PrefetchDataFetcher) and fetcher.length is None


def fetched(trainer: pl.Trainer) -> int:
    """How many batches of this epoch the fit loop has taken."""
    fetcher = trainer.fit_loop._data_fetcher
    return 0 if fetcher is None else fetcher.fetched


def watch_fetches(trainer: pl.Trainer, began: Callable[[], None], ended: Callable[[], None]) -> None:
    """For ``on_train_batch_start``: have ``began()`` and ``ended()`` called around each later fetch of this epoch.

    Lightning calls its profiler there, and forgets what was put in its place when the next epoch begins.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return
    start, stop = fetcher._start_profiler, fetcher._stop_profiler

    def start_both() -> None:
        start()
        began()

    def stop_both() -> None:
        ended()
        stop()

    fetcher._start_profiler, fetcher._stop_profiler = start_both, stop_both


def fetch_again(trainer: pl.Trainer) -> None:
    """Drop batches taken in advance, and begin again."""
    if trainer.fit_loop._data_fetcher is not None:
        iter(trainer.fit_loop._data_fetcher)


def goes_on_within_epoch(trainer: pl.Trainer) -> bool:
    """For ``on_train_start``: whether the fit loop goes on where it was stopped, rather than with another epoch."""
    return bool(trainer.fit_loop.restarting)


def epoch_is_trained(trainer: pl.Trainer) -> bool:
    """Whether the last batch of the epoch has been trained on."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def close_trained_epoch(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: let a run that was saved at the end of an epoch begin the next at batch 0.

    Lightning does so where it knows the number of batches in advance, and not if there is a limit of steps: saved in
    ``on_train_epoch_end``, it would count the epoch once more, and train one less.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    unknown = trainer.num_training_batches == float("inf")
    if unknown and loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
        loop.batch_progress.increment_completed()
        _begin_epoch_anew(loop)
        loop.reset_restart_stage()
    elif fit_loop.restarted_on_epoch_end:
        fit_loop.epoch_progress.increment_completed()
        _begin_epoch_anew(loop)
        fit_loop.reset_restart_stage()


def _begin_epoch_anew(loop: Any) -> None:
    loop.batch_progress.reset_on_run()
    loop.scheduler_progress.reset_on_run()
    loop.automatic_optimization.optim_progress.reset_on_run()
    loop.val_loop.batch_progress.total.reset()


@dataclass(frozen=True)
class PlateauSteps:
    """Schedules that wait for a metric (``ReduceLROnPlateau``): Lightning steps them after checkpoints are saved.

    Attributes:
        metrics: The metrics that they wait for.
        due: The numbers of those that are yet to be stepped for the batch or epoch of the checkpoint.
    """

    metrics: dict[str, float]
    due: list[int]


def plateau_steps(trainer: pl.Trainer) -> PlateauSteps:
    """What a checkpoint of this moment leaves undone, and Lightning would not do when it resumes."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    epochs: Any = fit_loop.epoch_progress.current
    ends = {
        "step": batches.completed < batches.processed and not loop._should_accumulate(),
        # Saved after the last validation of an epoch, it will be ended by the resumed run.
        "epoch": loop._num_ready_batches_reached()
        and (batches.completed < batches.processed or epochs.completed < epochs.processed)
        and not _is_behind_epoch(trainer),
    }
    number = {"step": loop.batch_idx + 1, "epoch": trainer.current_epoch + 1}
    metrics, due = {}, []
    for i, config in enumerate(trainer.lr_scheduler_configs):
        value = trainer.callback_metrics.get(config.monitor or "") if config.reduce_on_plateau else None
        if value is not None:
            metrics[str(config.monitor)] = float(value)
            if ends[config.interval] and number[config.interval] % config.frequency == 0:
                due.append(i)
    return PlateauSteps(metrics, due)


def _is_behind_epoch(trainer: pl.Trainer) -> bool:
    """Whether this is a call that :func:`behind_module` has put off to the end of the epoch."""
    owner, name = _next_after_module(trainer)[_EPOCH_END]
    behind = vars(owner).get(name)
    return isinstance(behind, _Behind) and behind.is_calling


def step_plateau(trainer: pl.Trainer, steps: PlateauSteps) -> None:
    """Do what :func:`plateau_steps` said, with the metrics of then."""
    metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in steps.metrics.items()}
    trainer._logger_connector._callback_metrics.update(metrics)
    for i in steps.due:
        config = trainer.lr_scheduler_configs[i]
        trainer.lightning_module.lr_scheduler_step(config.scheduler, metrics[str(config.monitor)])


def step_plateau_at_epoch_end(trainer: pl.Trainer) -> None:
    """For ``on_train_epoch_end``: step what Lightning leaves out in the epoch that it was resumed in."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.fit_loop.restarting and loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def modes_of_training(trainer: pl.Trainer) -> dict[str, bool]:
    """During a validation: which parts of the module were in training mode before it, by name."""
    return dict(trainer.fit_loop.epoch_loop.val_loop._module_mode.mode) if trainer.validating else {}


def go_on_accumulating(trainer: pl.Trainer, batches: int) -> None:
    """For ``on_train_start``: accumulate so many batches, once callbacks have checked the Trainer's own number."""
    owner, name = trainer.strategy, "on_train_start"
    behind = _Behind(owner, name)
    behind.calls.append(lambda: setattr(trainer, "accumulate_grad_batches", batches))


def go_on_averaging(trainer: pl.Trainer) -> None:
    """For ``on_train_start``: let Lightning's StochasticWeightAveraging have its schedule in the middle of an epoch, too.

    It makes it when an epoch starts. The rates that are there stay: they are those of the schedule already.
    """
    for callback in callbacks(trainer):
        if not isinstance(callback, StochasticWeightAveraging) or callback._scheduler_state is None:
            continue
        if not callback._initialized and callback.swa_start <= trainer.current_epoch <= callback.swa_end:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            rates = [group["lr"] for group in groups]
            callback.on_train_epoch_start(trainer, trainer.lightning_module)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def saved_batches(checkpoint: dict[str, Any]) -> int:
    """How many batches of its epoch ``checkpoint`` was saved after; 0 if they were all."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    return 0 if progress is None or progress.get("is_last_batch") else int(progress["current"]["ready"])


def rescale_saved_batches(checkpoint: dict[str, Any], numerator: int, denominator: int) -> None:
    """Count batches as another number of ranks would have after as many samples."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    for key, value in {} if progress is None else progress["current"].items():
        progress["current"][key] = value * numerator // denominator


def drop_loader_states(checkpoint: dict[str, Any]) -> None:
    """Leave what Lightning knows of loaders out of ``checkpoint``: it is rank 0's only."""
    checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).pop("combined_loader", None)


def last_reload_epoch(trainer: pl.Trainer) -> float:
    """The epoch that the training loaders were made in."""
    return trainer.fit_loop._last_train_dl_reload_epoch


def set_last_reload_epoch(trainer: pl.Trainer, epoch: float) -> None:
    """Let the loaders be made again when they would be if this fit had made them in ``epoch``."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


# --- ranks before training starts -------------------------------------------------------------------------------------

_DECISIONS = "NEMOLOGGER_RANK_ZERO_DECISIONS"


class _Launching(SingleProcess):
    """Rank 0 of a run whose other processes Lightning starts later, as copies of this script: tell them by environment."""

    def broadcast(self, value: T) -> T:
        if isinstance(value, Failure):
            return value  # raised here, before the others exist
        decisions = json.loads(os.environ.get(_DECISIONS, "[]"))
        os.environ[_DECISIONS] = json.dumps([*decisions, value])
        return value


class _Launched(SingleProcess):
    """A process that Lightning started: it repeats the script, and hears rank 0's decisions in the order they fell."""

    def broadcast(self, value: T) -> T:
        first, *rest = json.loads(os.environ[_DECISIONS])
        os.environ[_DECISIONS] = json.dumps(rest)
        return first  # type: ignore[no-any-return]


def ranks_before_fit(trainer: pl.Trainer) -> Ranks:
    """The ranks of ``trainer`` while no process group need exist yet.

    Under torchrun, Slurm or MPI all processes are there: they connect now, the way Lightning would a moment later. Where
    Lightning starts the processes itself, rank 0 is alone and leaves its decisions for the others in the environment.
    Values that travel must be plain JSON.
    """
    if trainer.world_size == 1:
        return SingleProcess()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return connect()
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        return SingleProcess()
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment):
        if isinstance(launcher, _SubprocessScriptLauncher) and not environment.creates_processes_externally:
            return _Launching()
        if _DECISIONS in os.environ:
            return _Launched(trainer.global_rank, trainer.world_size)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        trainer.strategy._setup_distributed()  # the rest of its setup wants the module
    else:
        trainer.strategy.setup_environment()
    return connect()


def launches_on_each_node(trainer: pl.Trainer) -> bool:
    """Whether Lightning is to start processes on several nodes, each node's by itself: nobody can be asked yet."""
    launcher = trainer.strategy.launcher
    return (
        trainer.num_nodes > 1
        and isinstance(launcher, _SubprocessScriptLauncher)
        and not launcher.cluster_environment.creates_processes_externally
    )


def forks_later(trainer: pl.Trainer) -> bool:
    """Whether Lightning trains in processes that it forks or spawns, while this one only waits for them."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def forget_decisions() -> None:
    """Drop what :func:`ranks_before_fit` left in the environment; the processes it was for have started."""
    os.environ.pop(_DECISIONS, None)


# --- loggers ----------------------------------------------------------------------------------------------------------


def is_default_logger(trainer: pl.Trainer, logger: Logger) -> bool:
    """Whether ``logger`` is the one a Trainer makes when it is given none."""
    return (
        type(logger) in (TensorBoardLogger, CSVLogger)
        and logger.name == "lightning_logs"
        and os.path.abspath(str(logger.save_dir)) == os.path.abspath(str(trainer.default_root_dir))
    )


def flat_params(params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters without nesting: ``{"a": {"b": 1}}`` is ``{"a/b": 1}``, and callables are their names."""
    flat = _flatten_dict(params)
    return {key: getattr(value, "__name__", str(value)) if callable(value) else value for key, value in flat.items()}


def is_open(logger: Logger) -> bool:
    """Whether ``logger`` has already started to write."""
    return getattr(logger, "_experiment", None) is not None


def move_tensorboard(
    logger: TensorBoardLogger, save_dir: Path, name: str, version: str, *, default_hp_metric: bool | None = None
) -> None:
    """Build ``logger`` again so that it writes to ``save_dir / name / version``; all else stays as it was given."""
    logger.__init__(  # type: ignore[misc]  # the same object: the caller may hold it
        save_dir=str(save_dir),
        name=name,
        version=version,
        log_graph=logger._log_graph,
        default_hp_metric=logger._default_hp_metric if default_hp_metric is None else default_hp_metric,
        prefix=logger._prefix,
        sub_dir=logger.sub_dir,
        **logger._kwargs,
    )


def move_wandb(logger: WandbLogger, save_dir: Path, run_id: str) -> None:
    """Build ``logger`` again so that it writes below ``save_dir`` and continues the run ``run_id``."""
    settings = {k: v for k, v in logger._wandb_init.items() if k not in {"dir", "id", "anonymous", "name", "project"}}
    settings["settings"] = _flushing_soon(settings.get("settings"))
    logger.__init__(  # type: ignore[misc]  # the same object: the caller may hold it
        name=logger._wandb_init["name"],
        save_dir=str(save_dir),
        offline=logger._offline,
        id=run_id,
        anonymous=bool(logger._wandb_init["anonymous"]) or None,
        project=logger._wandb_init["project"],
        log_model=logger._log_model,
        prefix=logger._prefix,
        checkpoint_name=logger._checkpoint_name,
        add_file_policy=logger.add_file_policy,
        **settings,
    )


def _flushing_soon(settings: Any) -> Any:
    """W&B's settings with what it has logged written to its file every second: else a killed run loses 15 s of it."""
    from wandb import Settings

    interval = "x_transaction_log_flush_interval"
    if interval not in Settings.model_fields or f"WANDB__{interval.removeprefix('x_').upper()}" in os.environ:
        return settings  # an earlier W&B knows no such setting
    if settings is None:
        return {interval: 1.0}
    if isinstance(settings, dict):
        return {interval: 1.0, **settings}
    if interval not in settings.model_fields_set:
        settings = settings.model_copy(update={interval: 1.0})
    return settings


def wandb_run_id(logger: WandbLogger) -> str | None:
    """The run id that ``logger`` was given, if any."""
    run_id: str | None = logger._wandb_init.get("id")
    return run_id


def log_wandb_checkpoints_by(logger: WandbLogger, log: Callable[[ModelCheckpoint], None]) -> None:
    """Have ``log`` called where ``logger`` would log the checkpoints that are files."""
    if logger._log_model:
        logger._scan_and_log_checkpoints = log  # type: ignore[method-assign,assignment]


def log_wandb_files(logger: WandbLogger, checkpoint: ModelCheckpoint) -> None:
    """Log the checkpoints that are files."""
    type(logger)._scan_and_log_checkpoints(logger, checkpoint)


def wandb_artifact(logger: WandbLogger) -> str | None:
    """What ``logger`` was told to call the artifact of checkpoints."""
    return logger._checkpoint_name


def wandb_metric(logger: WandbLogger, key: str) -> str:
    """What ``logger`` calls the metric ``key``."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{key}" if logger._prefix else key
