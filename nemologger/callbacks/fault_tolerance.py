"""End ranks that hang, so that the launcher restarts the run."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.callbacks import nvrx
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError
from nemologger.ranks import why_restarts_may_hang
from nemologger.run.directory import ERROR_LOG, rank_log
from nemologger.run.record import record_of, run_of
from nemologger.saving.kept_checkpoints import ours
from nemologger.watch.board import Board, Section
from nemologger.watch.guard import Guard
from nemologger.watch.patience import Patience

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_WARM_UP = 3  # batches that allocate, compile and look for the fastest kernels
_NVRX = "FaultToleranceCallback"
_FLOOR = 12  # check intervals: no learned timeout is shorter
# What torchrun tells its ranks.
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"


class FaultTolerance(IOMixin, Callback):
    """Watches over each rank from a process beside it, and ends a rank that hangs.

    Start the run with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --max-restarts=N`` (on several nodes
    ``--rdzv-backend=c10d``): it starts all ranks again when one has ended, and with ``AutoResume(resume_if_exists=True)``
    they go on from the newest checkpoint. Without that variable restarted ranks may find the addresses of those that are
    gone, and wait for them. A message in the log of the rank, in
    ``nemo_error_log.txt`` and on stderr says which rank on which host it was, for how long it was silent, at which step and
    doing what, and where each of its threads was.

    A rank gives a sign of life at every training and validation batch, at saves and between epochs; that costs some 20
    microseconds a step. Training steps may take ``rank_heartbeat_timeout``, all else (the start, the first three steps, a
    validation batch, a save, the change of epoch, the end) ``initial_rank_heartbeat_timeout``. With ``calculate_timeouts``
    these are for what has not been seen yet; after 32 steps, or three times of the rest, the timeout is ``safety_factor``
    times the longest that was seen, at least 12 ``workload_check_interval``. For saving, and for waiting for a save that is
    under way beside training, it never gets shorter than what was given: a disk or store that is stuck for some minutes is
    no reason to end a run. What was learned is in the checkpoints; a restart doubles it.

    When one rank hangs, all are silent: the others wait for it. A rank that waits in torch.distributed or for the gradients
    of the others is only reported, and ended after twice the time, so that the one that hangs is named and ended first.

    Args:
        initial_rank_heartbeat_timeout: Seconds; None for no limit until one is learned.
        rank_heartbeat_timeout: Seconds; None for no limit until one is learned.
        calculate_timeouts: Learn the timeouts.
        safety_factor: A learned timeout is so many times what was seen.
        workload_check_interval: Seconds between two looks of the monitor.
        rank_termination_signal: Ends a rank that hangs; a name or a number. If it is not SIGKILL, that follows after 30 s.
        log_level: Of the monitor; a name or a number.
        max_rank_restarts: Has no effect: it is ``torchrun --max-restarts``.
        max_subsequent_job_failures: With ``use_nvrx``, more than 0 lets a complete run make the file that
            ``FAULT_TOL_FINISHED_FLAG_FILE`` names; else it has no effect.
        additional_ft_launcher_args: Has no effect: give them to the launcher.
        simulated_fault: With ``use_nvrx`` and CUDA, ends or stops a rank: ``fault_type`` (``"rank_killed"``,
            ``"rank_hung"`` or ``"random"``), ``base_delay`` and ``rand_delay`` in seconds, ``rank_to_fail``; else it has no
            effect.
        use_nvrx: Report to the ``ft_launcher`` of ``nvidia-resiliency-ext`` instead of a monitor of our own. The default,
            None: if that has started the run. All timeouts, the signal and the log level are the launcher's then:
            ``ft_launcher --ft-cfg-path`` reads them from the ``fault_tolerance`` section of the YAML file that exp_manager's
            is in. Its monitors end all ranks when one hangs.

    Raises:
        ConfigurationError: If arguments cannot work, or ``nvidia-resiliency-ext`` is wanted and not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = FaultTolerance(rank_heartbeat_timeout=600.0)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        initial_rank_heartbeat_timeout: float | None = 60.0 * 60.0,
        rank_heartbeat_timeout: float | None = 45.0 * 60.0,
        calculate_timeouts: bool = True,
        safety_factor: float = 5.0,
        workload_check_interval: float = 5.0,
        rank_termination_signal: signal.Signals | int | str = "SIGKILL",
        log_level: int | str = "INFO",
        max_rank_restarts: int = 0,
        max_subsequent_job_failures: int = 0,
        additional_ft_launcher_args: str = "",
        simulated_fault: Any = None,
        use_nvrx: bool | None = None,
    ) -> None:
        _check_arguments(
            initial_rank_heartbeat_timeout,
            rank_heartbeat_timeout,
            workload_check_interval,
            safety_factor,
            learns=calculate_timeouts,
        )
        self.initial_rank_heartbeat_timeout = initial_rank_heartbeat_timeout
        self.rank_heartbeat_timeout = rank_heartbeat_timeout
        self.calculate_timeouts = calculate_timeouts
        self.safety_factor = safety_factor
        self.workload_check_interval = workload_check_interval
        self.rank_termination_signal = _signal(rank_termination_signal)
        self.log_level = _level(log_level)
        self.max_subsequent_job_failures = max_subsequent_job_failures
        self.simulated_fault = simulated_fault
        self.use_nvrx = nvrx.is_launched() if use_nvrx is None else use_nvrx
        if self.use_nvrx:
            nvrx.callback_class(_NVRX)
        _warn_of_no_effect(
            self.use_nvrx,
            max_rank_restarts=max_rank_restarts,
            max_subsequent_job_failures=max_subsequent_job_failures,
            additional_ft_launcher_args=additional_ft_launcher_args,
            simulated_fault=simulated_fault,
        )
        self._learned: dict[str, Any] = {}
        self._patience: Patience | None = None
        self._board: Board | None = None
        self._guard: Guard | None = None
        self._section = Section.START
        self._since = 0.0
        self._batches = self._step = 0
        self._has_others = self._may_wait_for_disk = False

    # --- life -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the monitor of this rank."""
        if stage != "fit" or lightning_port.is_trial(trainer):
            return
        if self.use_nvrx:
            nvrx.check_launch(
                simulated_fault=self.simulated_fault, max_subsequent_job_failures=self.max_subsequent_job_failures
            )
            nvrx.attach(trainer, pl_module, lambda: self._nvrx_callback(trainer), _NVRX)
            return
        self._release()
        why = why_restarts_may_hang(trainer.world_size)
        if why and trainer.is_global_zero and record_of(trainer) is None:  # else NeMoLogger has said it
            log.warning("%s", why)
        self._patience = Patience(
            self.initial_rank_heartbeat_timeout,
            self.rank_heartbeat_timeout,
            learn=self.calculate_timeouts,
            factor=self.safety_factor,
            floor=_FLOOR * self.workload_check_interval,
            restarts=int(os.environ.get(_RESTARTS, "0")),
        )
        self._patience.add_plain(self._learned)
        self._batches = self._step = 0
        self._has_others = trainer.world_size > 1
        self._section = Section.START
        self._since = time.perf_counter()
        self._board = Board()
        self._board.set_timeouts(self._patience.timeouts())
        self._board.give_sign(0, Section.START)
        self._start_guard(trainer)

    def _start_guard(self, trainer: pl.Trainer) -> None:
        if self._board is not None:
            self._guard = Guard(
                self._board,
                rank=trainer.global_rank,
                interval=self.workload_check_interval,
                end_with=int(self.rank_termination_signal),
                log_level=self.log_level,
                log_files=_log_files(trainer),
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the monitor."""
        if stage == "fit":
            self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the monitor: this rank is about to end by itself."""
        self._release()

    def _release(self) -> None:
        if self._patience is not None:
            self._learned = self._patience.to_plain()
        if self._guard is not None:
            self._guard.close()
        if self._board is not None:
            self._board.close()
        self._guard = self._board = self._patience = None

    # --- signs of life --------------------------------------------------------------------------------------------

    def _give_sign(self, trainer: pl.Trainer, section: Section, *, before_saving: bool = False) -> None:
        """This rank has come so far, and begins with ``section``.

        ``before_saving``: checkpoint callbacks are called next, and if a save is under way beside training, they may wait
        for it. A disk that is stuck then is no step that hangs.
        """
        if self._board is None or self._patience is None:
            return
        self._may_wait_for_disk = before_saving and any(checkpoint.busy for checkpoint in ours(trainer))
        if self._may_wait_for_disk:
            section = Section.CHECKPOINT
        now = time.perf_counter()
        if self._patience.saw(self._section, now - self._since):
            self._board.set_timeouts(self._patience.timeouts())
        self._section, self._since = section, now
        self._step = trainer.global_step
        self._board.give_sign(self._step, section)

    def _training(self) -> Section:
        return Section.STEP if self._batches >= _WARM_UP else Section.START

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        self._batches += 1
        self._give_sign(trainer, self._training(), before_saving=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What may have waited for the disk is over."""
        if self._may_wait_for_disk:
            self._give_sign(trainer, self._training())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """When its gradients are computed, those of the others are waited for."""
        board = self._board
        if board is not None and self._has_others:
            section, step = self._section, self._step
            lightning_port.at_end_of_backward(loss, lambda: board.give_sign(step, section, waiting=True))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All gradients are there."""
        if self._board is not None and self._has_others:
            self._board.give_sign(self._step, self._section)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation begins, or a look at it before training."""
        self._look_after_guard(trainer)
        self._give_sign(trainer, Section.START if trainer.sanity_checking else Section.VALIDATION)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch of it is done."""
        section = Section.START if trainer.sanity_checking else Section.VALIDATION
        self._give_sign(trainer, section, before_saving=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on."""
        self._give_sign(trainer, self._training(), before_saving=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The next epoch may begin with new workers."""
        self._look_after_guard(trainer)
        self._give_sign(trainer, Section.EPOCH, before_saving=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is left happens once."""
        self._give_sign(trainer, Section.END)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A save begins; the next sign is its end."""
        self._look_after_guard(trainer)
        self._give_sign(trainer, Section.END if self._section is Section.END else Section.CHECKPOINT)

    def _look_after_guard(self, trainer: pl.Trainer) -> None:
        """Start the monitor again if something has ended it."""
        if self._guard is not None and not self._guard.alive:
            self._guard.close()
            log.warning("the monitor of rank %d has ended by itself; another one is started", trainer.global_rank)
            self._start_guard(trainer)

    # --- what was learned -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was learned on this rank. All train in step, so rank 0's, which are kept, are those of the others."""
        learned = self._learned if self._patience is None else self._patience.to_plain()
        return {"learned": learned} if learned else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on learning from there."""
        self._learned = dict(state_dict.get("learned", {}))
        if self._patience is not None and self._board is not None:
            self._patience.add_plain(self._learned)
            self._board.set_timeouts(self._patience.timeouts())

    def _nvrx_callback(self, trainer: pl.Trainer) -> Any:
        run = run_of(trainer)
        return nvrx.callback_class(_NVRX)(
            autoresume=self.max_subsequent_job_failures > 0,
            calculate_timeouts=self.calculate_timeouts,
            simulated_fault_params=self.simulated_fault,
            exp_dir=trainer.default_root_dir if run is None else run.log_dir,
        )


def _log_files(trainer: pl.Trainer) -> list[Path]:
    run = run_of(trainer)
    if run is None:
        return []
    names = rank_log(trainer.global_rank, trainer.local_rank), ERROR_LOG
    return [run.log_dir / name for name in names]


def _signal(given: signal.Signals | int | str) -> signal.Signals:
    try:
        return signal.Signals[given] if isinstance(given, str) else signal.Signals(given)
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"rank_termination_signal={given!r}: expected the name or number of a signal, for example 'SIGKILL'"
        ) from error


def _level(given: int | str) -> int:
    level = logging.getLevelName(given.upper()) if isinstance(given, str) else given
    if not isinstance(level, int):
        raise ConfigurationError(f"log_level={given!r}: expected a level of Python's logging, for example 'INFO'")
    return level


def _check_arguments(initial: Any, later: Any, interval: Any, factor: Any, *, learns: bool) -> None:
    for name, seconds in (("initial_rank_heartbeat_timeout", initial), ("rank_heartbeat_timeout", later)):
        if seconds is not None and not holds(lambda time: time > 0, seconds):
            raise ConfigurationError(f"{name}={seconds!r}: expected seconds, more than 0, or None for no limit")
    if not holds(lambda: 0 < interval < math.inf):
        raise ConfigurationError(f"workload_check_interval={interval!r}: expected seconds, more than 0")
    if not holds(lambda: 1 <= factor < math.inf):
        raise ConfigurationError(
            f"safety_factor={factor!r}: expected a number from 1 on; with less than 1 healthy ranks are ended"
        )
    if not learns and initial is None and later is None:
        raise ConfigurationError(
            "there is no timeout at all: give rank_heartbeat_timeout, or leave calculate_timeouts=True"
        )


def _warn_of_no_effect(use_nvrx: bool, **given: Any) -> None:
    """Say which arguments, of those that were given, do nothing."""
    instead = {
        "max_rank_restarts": "start the run with torchrun --max-restarts",
        "additional_ft_launcher_args": "give them to the launcher",
    }
    if not use_nvrx:
        instead["max_subsequent_job_failures"] = "let the scheduler start the job again"
        instead["simulated_fault"] = "it is of nvidia-resiliency-ext, use_nvrx=True"
    for name, advice in instead.items():
        if given[name]:
            log.warning("FaultTolerance(%s=%r) has no effect: %s", name, given[name], advice)
