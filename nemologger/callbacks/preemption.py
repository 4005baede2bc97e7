"""Save and stop when the scheduler takes the machine away."""

from __future__ import annotations

import logging
import signal
import threading
from datetime import timedelta
from functools import partial
from operator import index
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import SIGTERMException

from nemologger import lightning_port
from nemologger.callbacks.deaf_workers import DeafWorkers
from nemologger.callbacks.stop_at_boundary import StopAtBoundary
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError, SaveFailedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    import lightning.pytorch as pl

    from nemologger.saving.kept_checkpoints import KeptCheckpoints

log = logging.getLogger(__name__)

_IN_A_THREAD = "{} is not listened to: fit runs in a thread that is not the main one"


class PreemptionCallback(IOMixin, StopAtBoundary):
    """On a signal, saves and exits at the next step boundary, so that the next run goes on as if nothing had happened.

    It is enough that one rank gets the signal, and it may get it several times. At the end of the optimizer step that is
    under way (or of the validation, if one is under way or due then) all ranks save through the trainer's
    ``nemologger.ModelCheckpoint``, wait until the checkpoint is published, with ``async_save`` too, and exit. A process that
    is killed before that loses what came after the last published checkpoint, and nothing else. A run whose last step is
    done ends as usual. Workers of data loaders do not end by the signal either: schedulers send it to all processes.

    ``nemologger.ModelCheckpoint`` adds one for SIGTERM to its trainer, unless there is one: it is for another signal or exit
    code, or for other checkpoints than ours, that it is made by hand.

    Before the first step the signal is noted, from the moment on that Lightning would handle it, and from the first step (or
    the sanity check) to the end of ``fit`` its handler is this one's; then the one that was there before ``fit`` is back.
    Lightning's own handler stops only rank 0's way and may leave the ranks waiting for each other. With one process this
    costs nothing. With several, they exchange 16 bytes on the CPU (gloo): in every step, or if steps take less than 0.1 s,
    about every 0.1 s, but at least in every 16th step.

    On Slurm, a ModelCheckpoint does the same on ``SIGUSR1``, where Lightning would, and has the job requeued; with
    ``sig=signal.SIGUSR1`` this callback takes that over, and the job's script is to requeue on the exit code. ``torchrun``
    passes SIGTERM on to all ranks, kills them 30 s later, and has an exit code of its own.

    Args:
        sig: The signal.
        exit_code: What the process exits with, 0 to 255; by default 128 + the signal's number, for SIGTERM 143. Schedulers
            take 0 for a run that is complete.
        rank_timeout: How long to wait for the other ranks; None for as long as training itself does (the strategy's
            ``timeout``), but at least 10 minutes.

    Raises:
        ConfigurationError: If ``sig`` cannot be handled, or the code is none.

    Example:
        >>> import nemologger as nl
        >>> trainer = nl.Trainer(callbacks=[PreemptionCallback()], logger=False, accelerator="cpu")
        >>> PreemptionCallback(signal.SIGUSR2, exit_code=85).exit_code
        85
    """

    def __init__(
        self,
        sig: int | None = None,
        exit_code: int | None = None,
        rank_timeout: timedelta | None = None,
    ) -> None:
        super().__init__(rank_timeout)
        self.sig = _checked(signal.SIGTERM if sig is None else sig)
        if exit_code is not None and not holds(lambda: 0 <= index(exit_code) <= 255):
            raise ConfigurationError(f"PreemptionCallback(exit_code={exit_code!r}): expected 0 to 255")
        self.exit_code = 128 + self.sig if exit_code is None else exit_code
        self._received = False
        self._undo: list[Callable[[], None]] = []

    @property
    def _reason(self) -> str | None:
        return f"signal {self.sig.name}" if self._received else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Be told of SIGTERM as soon as Lightning is."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._received = False
        workers = DeafWorkers(self.sig)
        self._undo = [lightning_port.see_loaders(trainer, workers.add), partial(_give_back, trainer, workers)]
        if self.sig == signal.SIGTERM:
            self._undo.append(lightning_port.on_sigterm(trainer, self._receive))

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen. Lightning has put its own handlers in place by now, and will bring the earlier ones back."""
        super().on_train_start(trainer, pl_module)
        self._listen()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was found."""
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The signal is somebody else's again."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def _release(self) -> None:
        self._received = False
        while self._undo:
            self._undo.pop()()

    def _listen(self) -> None:
        if signal.getsignal(self.sig) == self._receive:
            return
        if _hears_nothing():
            log.warning("%s", _IN_A_THREAD.format(self.sig.name))
            return
        signal.signal(self.sig, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True  # no more than that: the handler may run in the middle of anything

    def _leave(self, trainer: pl.Trainer, failed: SaveFailedError | None) -> None:
        if failed is not None:
            log.error("the run could not be saved before it stops; the checkpoint before is the newest: %s", failed)
        for other in lightning_port.callbacks(trainer):
            if isinstance(other, PreemptionCallback):
                other.before_exit(trainer, self)
        lightning_port.let_processes_end()
        raise SIGTERMException(self.exit_code) from failed

    def before_exit(self, trainer: pl.Trainer, by: PreemptionCallback) -> None:
        """All is saved, and the processes are to end because of ``by``. Collective."""


def _give_back(trainer: pl.Trainer, workers: DeafWorkers) -> None:
    workers.end()
    for loader in (*lightning_port.training_loaders(trainer), *lightning_port.validation_loaders(trainer)):
        workers.give_back(loader)


class AddedPreemption(PreemptionCallback):
    """The one that a ModelCheckpoint adds: it takes no handler away that was there before ``fit``."""

    @classmethod
    def attach(cls, trainer: pl.Trainer, pl_module: pl.LightningModule, rank_timeout: timedelta) -> None:
        """Add one to ``trainer``, for use in another callback's ``setup``, unless it has one for SIGTERM."""
        callbacks = lightning_port.callbacks(trainer)
        if any(isinstance(callback, PreemptionCallback) and callback.sig == signal.SIGTERM for callback in callbacks):
            return
        added = cls(rank_timeout=rank_timeout)
        lightning_port.set_callbacks(trainer, [*callbacks, added])
        added.setup(trainer, pl_module, "fit")

    def _saves_with(self, checkpoint: KeptCheckpoints) -> bool:
        return super()._saves_with(checkpoint) and checkpoint.save_on_sigterm

    def _warn_of_no_save(self) -> None:
        """Nobody has asked for it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the signal ends the process at once, in the log files: nobody has asked for more."""
        super().on_train_start(trainer, pl_module)
        if _hears_nothing():
            log.info("%s", _IN_A_THREAD.format(self.sig.name))

    def _listen(self) -> None:
        """Lightning calls this one, and then the handler that was there."""


def _hears_nothing() -> bool:
    """Whether it is Python's rule that no handler can be put in place here: a worker of Ray trains in a thread."""
    return threading.current_thread() is not threading.main_thread()


def _checked(sig: int) -> signal.Signals:
    try:
        known = signal.Signals(sig)
    except ValueError as error:
        raise ConfigurationError(
            f"PreemptionCallback(sig={sig!r}): there is no such signal; expected signal.SIGTERM, for example"
        ) from error
    if known.name in ("SIGKILL", "SIGSTOP"):
        raise ConfigurationError(f"PreemptionCallback(sig={known.name}): no process can handle this signal")
    return known
