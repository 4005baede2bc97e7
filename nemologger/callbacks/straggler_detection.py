"""Say which rank slows the others down."""

from __future__ import annotations

import logging
import math
import socket
import statistics
import time
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

from nemologger import lightning_port
from nemologger.callbacks import nvrx
from nemologger.combination import sweep_job
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError
from nemologger.ranks import Ranks, SingleProcess
from nemologger.watch.own_time import Stopwatch
from nemologger.watch.stragglers import RankTime, Score, Straggler, batches_to_wait, scores, stragglers

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)

_WARM_UP = 3  # batches that allocate, compile and look for the fastest kernels


class StragglerDetection(IOMixin, Callback):
    """Measures how long each rank works on a batch by itself, and warns of those that are slow, by rank and host.

    The time of a step says nothing: all ranks wait for the slowest. Measured is the time for the data, plus the time from
    then until the end of the batch, without the waits of DistributedDataParallel: for gradients after the backward pass,
    and for buffers before the forward pass. What waits inside the forward pass remains in it: ``self.log(...,
    sync_dist=True, on_step=True)``, a SyncBatchNorm, sharded strategies. It makes ranks look more alike than they are.
    What other callbacks do after a batch does not count.

    Scores are 1.0 for as fast as can be, 0.5 for half as fast: relative ones compare a rank with the fastest, individual
    ones with its own best report of this fit. They are logged as ``gpu_relative_perf/min``, ``/median`` and ``/max`` and
    ``gpu_individual_perf/...``, on a CPU too.

    Ranks exchange their times about every ``report_time_interval``, at a batch that all of them know from the last
    exchange: between reports nothing is sent. What was found last is in :attr:`detected`.

    Args:
        report_time_interval: Seconds between reports.
        calc_relative_gpu_perf: Compare each rank with the fastest.
        calc_individual_gpu_perf: Compare each rank with its own best.
        num_gpu_perf_scores_to_log: So many of the best and of the worst ranks are listed in the log at each report; 0 for
            none.
        gpu_relative_perf_threshold: A rank with a lower relative score is a straggler.
        gpu_individual_perf_threshold: A rank with a lower individual score is a straggler.
        stop_if_detected: Stop training at a straggler, as early stopping does: a ModelCheckpoint saves the final state, and
            the next start goes on from there. ``fit`` returns; exit as the scheduler needs it if :attr:`detected`.
        use_nvrx: Use the callback of ``nvidia-resiliency-ext``, which measures CUDA kernels, instead; not without CUDA. It
            ends a run with ``stop_if_detected`` by exit code 1, when that is saved.

    Raises:
        ConfigurationError: If arguments cannot work, or ``nvidia-resiliency-ext`` is wanted and not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = StragglerDetection(report_time_interval=60.0)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        report_time_interval: float = 300.0,
        calc_relative_gpu_perf: bool = True,
        calc_individual_gpu_perf: bool = True,
        num_gpu_perf_scores_to_log: int = 5,
        gpu_relative_perf_threshold: float = 0.7,
        gpu_individual_perf_threshold: float = 0.7,
        stop_if_detected: bool = False,
        use_nvrx: bool = False,
    ) -> None:
        if not holds(lambda: 0 < report_time_interval < math.inf):
            raise ConfigurationError(f"report_time_interval={report_time_interval!r}: expected seconds, more than 0")
        if not (calc_relative_gpu_perf or calc_individual_gpu_perf):
            raise ConfigurationError(
                "calc_relative_gpu_perf and calc_individual_gpu_perf are both False: there is nothing to detect by. Set one."
            )
        for name, value in (
            ("gpu_relative_perf_threshold", gpu_relative_perf_threshold),
            ("gpu_individual_perf_threshold", gpu_individual_perf_threshold),
        ):
            if not holds(lambda score: 0 <= score <= 1, value):
                raise ConfigurationError(f"{name}={value!r}: scores are between 0.0 and 1.0, and so is their threshold")
        if not holds(lambda: index(num_gpu_perf_scores_to_log) >= 0):
            raise ConfigurationError(
                f"num_gpu_perf_scores_to_log={num_gpu_perf_scores_to_log!r}: expected a whole number, 0 or more"
            )
        self.report_time_interval = report_time_interval
        self.calc_relative_gpu_perf = calc_relative_gpu_perf
        self.calc_individual_gpu_perf = calc_individual_gpu_perf
        self.num_gpu_perf_scores_to_log = num_gpu_perf_scores_to_log
        self.gpu_relative_perf_threshold = gpu_relative_perf_threshold
        self.gpu_individual_perf_threshold = gpu_individual_perf_threshold
        self.stop_if_detected = stop_if_detected
        self.use_nvrx = use_nvrx
        self.detected: list[Straggler] = []
        if use_nvrx:
            nvrx.callback_class("StragglerDetectionCallback")
        self._ranks: Ranks = SingleProcess()
        self._watch: Stopwatch | None = None
        self._hooks: list[RemovableHandle] = []
        self._best: list[float] = []
        self._host = socket.gethostname()
        self._batches = self._look = 0
        self._is_new_epoch = False
        self._since = 0.0

    # --- life -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect to the other ranks."""
        if stage != "fit" or lightning_port.is_trial(trainer):
            return
        if self.use_nvrx:
            nvrx.attach(trainer, pl_module, self._nvrx_callback, "StragglerDetectionCallback")
            return
        self._ranks = lightning_port.connect_as_patiently(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        self._release()
        if self.use_nvrx or lightning_port.is_trial(trainer):
            return
        self.detected = []
        self._best = [math.inf] * self._ranks.world_size
        self._watch = Stopwatch(trainer.strategy.root_device)
        if isinstance(trainer.model, DistributedDataParallel):
            # Its forward pass first brings rank 0's buffers; the module's own comes after that.
            watch = self._watch
            self._hooks = [
                trainer.model.register_forward_pre_hook(lambda *_: watch.wait_began()),
                pl_module.register_forward_pre_hook(lambda *_: watch.wait_ended()),
            ]
        elif self._ranks.world_size > 1 and trainer.is_global_zero:
            log.warning(
                "straggler detection: with %s ranks wait for each other within a batch, where that cannot be told from "
                "work. Slow ranks may go unnoticed.",
                type(trainer.strategy).__name__,
            )
        self._batches, self._look, self._is_new_epoch = -_WARM_UP, 1, True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the model as it was."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._watch = None

    # --- a batch --------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins."""
        if self._watch is not None:
            if self._is_new_epoch:
                lightning_port.watch_fetches(trainer, self._watch.fetch_began, self._watch.fetch_ended)
                self._is_new_epoch = False
            self._watch.batch_began()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning is about to forget whom it tells of fetches."""
        self._is_new_epoch = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """When its gradients are computed, those of the others are waited for."""
        if self._watch is not None and self._ranks.world_size > 1:
            lightning_port.at_end_of_backward(loss, self._watch.wait_began)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All gradients are there."""
        if self._watch is not None:
            self._watch.wait_ended()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is done; report if it is time."""
        if self._watch is None:
            return
        self._watch.batch_ended()
        self._batches += 1
        if self._batches == 0:
            self._watch.take()
            self._since = time.monotonic()
        elif self._batches >= self._look and not lightning_port.is_accumulating(trainer):
            # A stop in the middle of gradient accumulation would lose the gradients so far.
            self._look_at_the_clock(trainer)

    # --- reports --------------------------------------------------------------------------------------------------

    def _look_at_the_clock(self, trainer: pl.Trainer) -> None:
        """Report if the interval is over, else agree on when to look again. Collective."""
        slowest = max(self._ranks.gather(time.monotonic() - self._since))
        more = batches_to_wait(slowest, self._batches, self.report_time_interval)
        if more:
            self._look = self._batches + more
            return
        self._report(trainer)
        self._look = max(1, math.ceil(self.report_time_interval * self._batches / slowest))
        self._batches = 0
        self._since = time.monotonic()

    def _report(self, trainer: pl.Trainer) -> None:
        if self._watch is None:
            return
        times = self._ranks.gather(RankTime(self._host, self._watch.take(), time.monotonic() - self._since))
        self._best = [min(best, t.own.seconds) for best, t in zip(self._best, times, strict=True)]
        found = scores(
            times, self._best, relative=self.calc_relative_gpu_perf, individual=self.calc_individual_gpu_perf
        )
        self.detected = stragglers(found, self.gpu_relative_perf_threshold, self.gpu_individual_perf_threshold)
        if trainer.is_global_zero:
            self._log(trainer, found)
        if self.detected and self.stop_if_detected:
            trainer.should_stop = True  # on every rank: all have computed the same
            job = sweep_job()
            if job is not None and trainer.is_global_zero:
                job.postpone(f"training was stopped at step {trainer.global_step} because of stragglers")

    def _log(self, trainer: pl.Trainer, found: list[Score]) -> None:
        kinds = {
            "gpu_relative_perf": [score.relative for score in found if score.relative is not None],
            "gpu_individual_perf": [score.individual for score in found if score.individual is not None],
        }
        metrics = {
            f"{kind}/{name}": function(values)
            for kind, values in kinds.items()
            if values
            for name, function in (("min", min), ("median", statistics.median), ("max", max))
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=lightning_port.logged_step(trainer))
        for line in _listing(found, self.num_gpu_perf_scores_to_log):
            log.info("%s", line)
        for straggler in self.detected:
            log.warning("straggler: rank %d on host %s: %s", straggler.rank, straggler.host, straggler.reason)
        if self.detected and self.stop_if_detected:
            log.error("stopping at step %d because of stragglers (stop_if_detected=True)", trainer.global_step)

    def _nvrx_callback(self) -> Any:
        return nvrx.callback_class("StragglerDetectionCallback")(
            report_time_interval=self.report_time_interval,
            calc_relative_gpu_perf=self.calc_relative_gpu_perf,
            calc_individual_gpu_perf=self.calc_individual_gpu_perf,
            num_gpu_perf_scores_to_print=self.num_gpu_perf_scores_to_log,
            gpu_relative_perf_threshold=self.gpu_relative_perf_threshold,
            gpu_individual_perf_threshold=self.gpu_individual_perf_threshold,
            stop_if_detected=self.stop_if_detected,
            enable_ptl_logging=True,
        )


def _listing(found: list[Score], count: int) -> list[str]:
    """The ``count`` slowest ranks and the ``count`` fastest, a line each, slowest first."""
    ordered = sorted(found, key=lambda score: -score.time.own.seconds)
    shown = ordered if len(ordered) <= 2 * count else [*ordered[:count], *ordered[-count:]]
    return [
        f"rank {score.rank} on host {score.time.host}: {score.time.own.seconds * 1e3:.3g} ms a batch, "
        f"relative score {_shown(score.relative)}, individual score {_shown(score.individual)}"
        for score in (shown if count else [])
    ]


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
