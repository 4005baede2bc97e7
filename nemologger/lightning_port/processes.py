"""The processes of a run: before training starts, while they wait for each other, and when they end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout

from nemologger.errors import ConfigurationError
from nemologger.ranks import DEFAULT_TIMEOUT, Failure, Ranks, SingleProcess, connect

if TYPE_CHECKING:
    from types import FrameType

    import lightning.pytorch as pl

T = TypeVar("T")


_LEAVING = 2.0  # seconds
_DECISIONS = "NEMOLOGGER_RANK_ZERO_DECISIONS"


def check_is_no_child() -> None:
    """Refuse to begin a run where a worker process, or the server that forks them, only imports the program.

    Raises:
        ConfigurationError: If the program would start there once more. Python itself says so when the first worker of that
            run is started. By then the run would have been refused, since its directory is in use, or be in another one.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as Python's own check asks
        raise ConfigurationError(
            "a worker process imports this program, and would start its run once more. Workers of data loaders do so from "
            'Python 3.14 on, on macOS and on Windows. Begin the run below a line `if __name__ == "__main__":`, so that it '
            "is not begun by an import."
        )


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


def step_reached(trainer: pl.Trainer) -> str:
    """Where training is, for a message; "" in a process that only waits for those that train."""
    return "" if forks_later(trainer) else f" at step {trainer.global_step}"


def end_forked(trainer: pl.Trainer) -> None:
    """After Ctrl-C in a process that only waits for the ranks, end them too; Lightning lets them train on.

    Jupyter and terminals have told the whole group: they are about to leave by themselves. Others tell one process.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        for process in launcher.procs:
            process.join(_LEAVING)
        launcher.kill(signal.SIGINT)
        for process in launcher.procs:
            process.join(_LEAVING)


def forget_decisions() -> None:
    """Drop what :func:`ranks_before_fit` left in the environment; the processes it was for have started."""
    os.environ.pop(_DECISIONS, None)


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


def patience(trainer: pl.Trainer) -> timedelta:
    """How long training waits for another rank, as the strategy was told (``timeout``)."""
    return getattr(trainer.strategy, "_timeout", None) or default_pg_timeout


def connect_as_patiently(trainer: pl.Trainer) -> Ranks:
    """The ranks, for waits in the middle of training: what one of them may take there does not end the run here."""
    return connect(max(DEFAULT_TIMEOUT, patience(trainer)))


def on_sigterm(trainer: pl.Trainer, receive: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """For ``setup``: have ``receive`` called on SIGTERM where Lightning broadcasts, and return what undoes that.

    Lightning's handler makes a collective call out of whatever is under way, perhaps another collective: the ranks then
    wait for each other for ever, or crash. It is in place from behind ``setup`` to the end of the fit, and calls the one
    that was there before it too.
    """
    connector = trainer._signal_connector
    connector._sigterm_notifier_fn = receive  # type: ignore[method-assign,assignment]
    return lambda: connector.__dict__.pop("_sigterm_notifier_fn", None)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in here, also while a fit is ending because of an earlier one.

    Lightning ignores it from then on, however long that takes.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def let_processes_end() -> None:
    """Before all ranks exit with a code: let none of them be killed for it.

    Where Lightning has started the other processes, a thread looks after them every few seconds. It kills what is left
    once one of them has ended with another code than 0; this process, too, which may have loggers to close.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
