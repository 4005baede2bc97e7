"""Whether a resumed run repeats the steps that it had trained behind its checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from nemologger.exact.trained_steps import TrainedSteps

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

FILE = ".trained_steps"
# Seconds from one look at new values to the next: it waits for the GPU, and has them written to the file.
_LOOK_EVERY, _WRITE_EVERY = 1.0, 0.02
# So many steps are remembered while the disk does not answer.
_WAITING = 10_000
# Where kernels differ from run to run: how many steps say something, and what is the same.
_ROUGHLY, _SHARE, _APART = 10, 0.01, 0.001


class CompareSteps:
    """Says whether the steps that a run had trained behind its newest checkpoint come out the same when it goes on.

    Whatever a program keeps that no checkpoint holds: if it changes a loss, it is seen here. Rank 0 writes down the loss of
    each step (where a step returns none, the last number of the parameters), and a run that was killed and goes on compares
    what it trains again. The first step that differs is a warning; that none does is in the log, too.
    ``nemologger.ModelCheckpoint`` calls it, for a directory on a disk: another callback would cost each step several times
    what this does, as Lightning asks every one of them in every hook.

    On the CPU, and with ``Trainer(deterministic=True)``, to the bit; elsewhere only roughly, and for ten steps.

    Args:
        directory: Where the file with the last steps is; None to compare nothing.

    Example:
        >>> import tempfile
        >>> compare = CompareSteps(Path(tempfile.gettempdir()))
        >>> compare.close()  # nothing has been trained
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._resumes = False
        self._forget()

    def _forget(self) -> None:
        self._steps: TrainedSteps | None = None
        self._then: dict[int, str] = {}
        self._new: deque[tuple[int, torch.Tensor | float]] = deque(maxlen=_WAITING)
        self._pool: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None  # what compares and writes, beside training
        self._last = self._repeated = 0
        self._looked = 0.0
        self._exactly = self._waits = False
        self._parameter: torch.Tensor | None = None

    def resume(self) -> None:
        """A checkpoint is loaded: the fit that begins goes on with another."""
        self._resumes = True

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """For ``on_train_start``: read what was trained behind the checkpoint; forget another line of training."""
        # Lightning's tuners load what they had saved, at step 0.
        resumes, self._resumes = self._resumes and trainer.global_step > 0, False
        self.close()
        if self.directory is None or not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        self._waits = device.type != "cpu"
        self._exactly = not self._waits or torch.are_deterministic_algorithms_enabled()
        self._parameter = _last_parameter(pl_module)
        self._last = trainer.global_step
        try:
            machine = _machine(trainer.world_size, device)
            self._steps = TrainedSteps(self.directory / FILE, machine)
            if resumes and self._steps.found_on == machine:
                self._then = self._steps.behind(self._last)
            else:
                if resumes and (others := len(self._steps.behind(self._last))):
                    log.info(
                        "%d steps behind the checkpoint had been trained on %s: they are not compared with what comes on %s",
                        others, self._steps.found_on, machine,
                    )  # fmt: skip
                self._steps.forget_behind(self._last)
        except OSError as error:
            self._give_up(error)

    def note(self, trainer: pl.Trainer, outputs: Any) -> None:
        """For ``on_train_batch_end``: write down and compare what the step came to."""
        if self._steps is None or trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        value = _number(outputs.get("loss") if isinstance(outputs, Mapping) else None)
        value = _number(self._parameter) if value is None else value
        if value is not None:
            # What a device has not computed yet can change until it is looked at.
            self._new.append((self._last, value.clone() if self._waits else value.item()))
        if time.monotonic() - self._looked > (_LOOK_EVERY if self._waits else _WRITE_EVERY):
            self._look()

    def finish(self) -> None:
        """For ``on_train_end``, behind the last save: no step is trained again."""
        self._wait()
        self._look()
        self._wait()
        self._say_repeated()
        self._end(all_is_saved=True)

    def stop(self, newest_saved: int) -> None:
        """For ``on_exception``: leave the file for the next life, unless all was saved in time: none is trained again.

        Args:
            newest_saved: The step of the newest checkpoint, on rank 0.
        """
        if not self._waits:  # a device may never be done
            self._wait()
            self._look()
        self._end(all_is_saved=self._steps is not None and self._last <= newest_saved)

    def close(self) -> None:
        """Close the file."""
        self._end(all_is_saved=False)

    def _end(self, *, all_is_saved: bool) -> None:
        self._wait()
        steps, pool = self._steps, self._pool
        self._forget()
        if pool is not None:
            pool.shutdown()
        if steps is not None:
            steps.close()
            if all_is_saved:
                with suppress(OSError):
                    steps.remove()

    def _look(self) -> None:
        """Have what is new compared and written down; not while the disk has not taken what was new before."""
        if self._job is not None and not self._job.done():
            return
        self._looked = time.monotonic()
        self._wait()
        steps, new = self._steps, list(self._new)
        self._new.clear()
        if not new or steps is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="nemologger-compare")
        numbers = _on_host([value for _, value in new])
        self._job = self._pool.submit(self._compare_all, steps, [step for step, _ in new], numbers)

    def _wait(self) -> None:
        job, self._job = self._job, None
        try:
            if job is not None:
                job.result()
        except OSError as error:
            self._give_up(error)

    def _compare_all(self, steps: TrainedSteps, new: Sequence[int], numbers: Sequence[float]) -> None:
        for step, number in zip(new, numbers, strict=True):
            self._compare(steps, step, number)

    def _compare(self, steps: TrainedSteps, step: int, value: float) -> None:
        """Compare a step with the one before, and write it down unless that is there already."""
        then = self._then.pop(step, None)
        if then is None:
            steps.add(step, repr(value))
        elif self._same(then, value):
            self._repeated += 1
            if not self._exactly and self._repeated == _ROUGHLY:
                self._then = {}
                steps.forget_behind(step)
            if not self._then:
                self._say_repeated()
        else:
            self._say_other(step, then, repr(value))
            self._then = {}
            steps.add(step, repr(value))

    def _same(self, then: str, now: float) -> bool:
        if then == repr(now):
            return True
        try:
            return not self._exactly and math.isclose(float(then), now, rel_tol=_SHARE, abs_tol=_APART)
        except ValueError:  # not a number
            return False

    def _say_repeated(self) -> None:
        if self._repeated:
            log.info(
                "%d steps that had been trained before the run ended, behind its checkpoint, are the same again%s",
                self._repeated, ", to the bit" if self._exactly else ", as far as kernels of this device repeat",
            )  # fmt: skip
            self._repeated = 0

    def _say_other(self, step: int, then: str, now: str) -> None:
        log.warning(
            "step %d, trained again, is not what it was before the run ended: %s then, %s now (%d steps before it are). "
            "Where code, settings, data (if drawn: with a seed) and machine are the same and kernels repeat "
            "(Trainer(deterministic=True)), this program changes something while it trains that is in no checkpoint. What "
            "is known of that is in lines with 'exact resume', here or in the log of an earlier start; buffers of the "
            "module, and objects with state_dict() and load_state_dict(), are in checkpoints.",
            step, then, now, self._repeated,
        )  # fmt: skip
        self._repeated = 0

    def _give_up(self, error: OSError) -> None:
        log.info("what steps come to is not written down, and not compared when this run goes on: %s", error)
        if self._steps is not None:
            self._steps.close()
        self._steps, self._then = None, {}
        self._new.clear()


def _machine(ranks: int, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{ranks} x {name}{threads}, torch {torch.__version__}"


def _last_parameter(module: torch.nn.Module) -> torch.Tensor | None:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return trained[-1] if trained else None


def _on_host(values: list[torch.Tensor | float]) -> list[float]:
    """The numbers, with one wait for the device if there are many."""
    waiting = [value for value in values if isinstance(value, torch.Tensor)]
    alike = len(waiting) == len(values) and len({(value.device, value.dtype) for value in waiting}) == 1
    if alike and waiting[0].dtype.itemsize > 1:  # the smallest types cannot be put together
        numbers: list[float] = torch.stack(waiting).tolist()
        return numbers
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]


def _number(value: Any) -> torch.Tensor | None:
    """The last number of a plain tensor, or of what this rank has of one."""
    if isinstance(value, DTensor):
        value = value.detach().to_local()  # type: ignore[attr-defined]  # of its subclass
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return None
    if value.layout != torch.strided or value.device.type == "meta" or not value.numel():
        return None
    return value.detach()[(-1,) * value.ndim] if value.ndim else value.detach()
