"""What takes memory, and when."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from nemologger.callbacks.profile_window import ProfileWindow
from nemologger.errors import ConfigurationError
from nemologger.run.record import run_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_DIRECTORY = "memory_profile"
_MAX_ENTRIES = 100_000
_DEVICES = {0: "cpu", 1: "cuda"}


class MemoryProfileCallback(ProfileWindow):
    """Records every allocation in a range of optimizer steps, on the CPU and on CUDA.

    It writes, for each rank, into ``dir``:

    * ``rank0-steps0-3.trace.json.gz``: a trace of torch.profiler with operators, shapes and allocations, for
      https://ui.perfetto.dev or Chrome's ``chrome://tracing``;
    * ``rank0-steps0-3.memory.csv``: a line ``microseconds,device,bytes,allocated`` for each allocation (``bytes`` is
      negative when memory is given back) and what is allocated after it, counted from the first step of the range;
    * on CUDA, ``rank0-steps0-3.snapshot.pickle``: the history of the allocator, with stacks, for
      https://pytorch.org/memory_viz.

    Profiled steps are slow, and are held in memory until the range ends: keep it short.

    Args:
        dir: Where to write; default ``memory_profile/`` in the run directory, or in the trainer's ``default_root_dir``.
        warn_cycles: Warn of tensors that only Python's garbage collector can free, because they are in a reference cycle:
            their memory stays taken until it happens to run.
        ranks: The global ranks that do it; empty for all.
        start_step: Begin when so many optimizer steps have been made, counted over the whole run.
        end_step: End when so many have been made. The same number as ``start_step`` means one step.
        cuda_history: Write the snapshot of CUDA's allocator; default where the trainer runs on CUDA.

    Raises:
        ConfigurationError: If the numbers cannot work; at setup, if ``cuda_history=True`` and the trainer does not run on
            CUDA.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(callbacks=[MemoryProfileCallback("profile", end_step=1)], max_steps=2, limit_val_batches=0,
        ...     accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> sorted(path.name for path in Path("profile").iterdir())
        ['rank0-steps0-1.memory.csv', 'rank0-steps0-1.trace.json.gz']
    """

    def __init__(
        self,
        dir: str | os.PathLike[str] | None = None,  # NeMo's name
        warn_cycles: bool = True,
        ranks: Sequence[int] = (),
        start_step: int = 0,
        end_step: int = 3,
        cuda_history: bool | None = None,
    ) -> None:
        super().__init__(start_step, end_step, ranks)
        if dir is not None and not isinstance(dir, str | os.PathLike):
            raise ConfigurationError(f"MemoryProfileCallback(dir={dir!r}): expected a path")
        self.dir = dir
        self.warn_cycles = warn_cycles
        self.cuda_history = cuda_history
        self._profile: profile | None = None
        self._cycles: _Cycles | None = None
        self._began = 0
        self._with_history = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that what is asked for can be had.

        Raises:
            ConfigurationError: If CUDA or a rank is not there.
        """
        super().setup(trainer, pl_module, stage)
        device = trainer.strategy.root_device
        if stage == "fit" and self.cuda_history and device.type != "cuda":
            raise ConfigurationError(
                f"MemoryProfileCallback(cuda_history=True) needs CUDA, this trainer runs on {device.type}: leave "
                "cuda_history out for the trace alone"
            )

    def begin(self, trainer: pl.Trainer) -> None:
        """Start to record."""
        self._began = trainer.global_step
        on_cuda = trainer.strategy.root_device.type == "cuda"
        self._with_history = on_cuda if self.cuda_history is None else self.cuda_history
        if self._with_history:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)  # noqa: SLF001  it has no public name
        if self.warn_cycles:
            self._cycles = _Cycles()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the batch in the trace, and look for cycles."""
        if self._profile is not None:
            self._profile.step()
        if self._cycles is not None:
            found = self._cycles.found()
            if found:
                log.warning("rank %d, step %d: %s", trainer.global_rank, trainer.global_step, found)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def end(self, trainer: pl.Trainer) -> None:
        """Stop, and write the files."""
        if self._cycles is not None:
            self._cycles.close()
            self._cycles = None
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        recorded.stop()
        directory = self._directory(trainer)
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"rank{trainer.global_rank}-steps{self._began}-{trainer.global_step}"
        trace = directory / f"{stem}.trace.json.gz"
        recorded.export_chrome_trace(str(trace))
        _write_timeline(trace, directory / f"{stem}.memory.csv")
        if self._with_history:
            snapshot = str(directory / f"{stem}.snapshot.pickle")
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]  # noqa: SLF001
            torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
        log.info("memory profile of steps %d to %d: %s", self._began, trainer.global_step, trace)

    def _directory(self, trainer: pl.Trainer) -> Path:
        if self.dir is not None:
            return Path(self.dir)
        run = run_of(trainer)
        return (Path(trainer.default_root_dir) if run is None else run.log_dir) / _DIRECTORY


class _Cycles:
    """Holds the garbage collector back, and looks at what it would collect."""

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def found(self) -> str:
        """What is to be said of the tensors in unreachable cycles since the last call; they are freed."""
        flags, before = gc.get_debug(), len(gc.garbage)
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            garbage = gc.garbage[before:]
            tensors = [thing for thing in garbage if issubclass(type(thing), torch.Tensor)]
            size = sum(tensor.nbytes for tensor in tensors if tensor.layout == torch.strided)
            around = _kinds_around(tensors, garbage)
            shapes = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors[:3])
            count = len(tensors)
        finally:
            del gc.garbage[before:]
            gc.set_debug(flags)
        garbage, tensors = [], []
        gc.collect()  # now for good
        if not count:
            return ""
        kinds = ", ".join(name for name, _ in around.most_common(5))
        return (
            f"{count} tensors ({size / 1e6:.3g} MB; {shapes}) were in reference cycles of {kinds}, and would have kept "
            "their memory until Python's garbage collector ran. Break the cycle, or hold one side by weakref"
        )

    def close(self) -> None:
        """Let the garbage collector go."""
        if self._was_enabled:
            gc.enable()


def _kinds_around(tensors: list[Any], garbage: list[Any]) -> Counter[str]:
    """What leads to ``tensors``: other things that are collected at the same time say nothing of them."""
    holders: defaultdict[int, list[Any]] = defaultdict(list)
    for thing in garbage:
        for part in gc.get_referents(thing):
            holders[id(part)].append(thing)
    seen, waiting = {id(tensor) for tensor in tensors}, list(tensors)
    kinds: Counter[str] = Counter()
    while waiting:
        for holder in holders.get(id(waiting.pop()), ()):
            if id(holder) not in seen:
                seen.add(id(holder))
                waiting.append(holder)
                kinds[type(holder).__name__] += 1
    return kinds


def _write_timeline(trace: Path, target: Path) -> None:
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    with target.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("microseconds", "device", "bytes", "allocated"))
        for event in events:
            about = event["args"]
            kind, number = _DEVICES.get(about["Device Type"], str(about["Device Type"])), about["Device Id"]
            device = kind if number < 0 else f"{kind}:{number}"
            moment = f"{event['ts'] - events[0]['ts']:.3f}"
            writer.writerow((moment, device, about["Bytes"], about["Total Allocated"]))
