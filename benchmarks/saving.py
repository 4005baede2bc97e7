"""What a save costs training: real ``Trainer.fit`` of a model of about 1 GB of state, one way of saving after the other.

    pip install "nemologger[bench]"
    python benchmarks/saving.py            # some minutes; writes saving.json and saving.png
    python benchmarks/saving.py --small    # under a minute
    python benchmarks/saving.py --only nemologger --turns 15

``stall`` is how long the training thread is blocked, ``lost`` the wall time that the steps around a save take longer than
the steps beside them (what the writer takes from the processor included: the honest figure), ``durable`` the time
until the bytes are safe on disk with nobody training, ``load`` the time into a fresh model and optimizer from a cold page
cache (ours with checksums), ``memory`` the memory that a save needs beside the state, at its peak. The ways take turns in
one fit, and so do the limits (copying, writing and reading as many bytes with nothing else to do); figures are medians, in
seconds; the first save counts. Then steps without a save, and the time until the first step of a new and of a resumed run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from limits import Limits, forget
from torch import nn
from torch.utils.data import DataLoader
from ways import Ours, Way, close, peers

import nemologger
from nemologger import AutoResume, ModelCheckpoint, NeMoLogger

WINDOW = 6


class Wide(pl.LightningModule):
    """Linear layers and Adam: three floats of state per parameter."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        width = int((megabytes * 1e6 / 12 / 8) ** 0.5)
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
        self.width = width

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch[:, :1].expand(-1, self.width)).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-5)


class Measure(pl.Callback):
    """Every ``WINDOW`` steps the next way saves, and every other window nobody does."""

    def __init__(self, ways: dict[str, Way], directory: Path, turns: int) -> None:
        self.ways, self.directory = ways, directory
        self.schedule = [name for _ in range(turns) for name in ways]
        self.windows: list[tuple[str | None, float]] = []
        self.began = 0.0
        self.path = directory
        self.watching = contextlib.ExitStack()
        self.grown = [0]

    @property
    def steps(self) -> int:
        return 2 * WINDOW * (len(self.schedule) + 1) + WINDOW

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step % WINDOW:
            return
        now = time.perf_counter()
        number = step // WINDOW - 1
        if number >= 1:
            self.windows.append((self._way(number), now - self.began))
        name = self._way(number + 1)
        self.began = time.perf_counter()
        if name is not None:
            way, path = self.ways[name], Path(tempfile.mkdtemp(dir=self.directory))
            self.path, first = path, not way.stall
            if first:  # what is kept from the first save on
                self.grown = self.watching.enter_context(watched())
            self.began = time.perf_counter()
            way.save(trainer, path)
            way.stall.append(time.perf_counter() - self.began)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        for way in self.ways.values():
            way.before_step()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # The window of a save is over: whatever is still being written is waited for outside of all figures.
        step = trainer.global_step
        if step and step % WINDOW == 0 and (name := self._way(step // WINDOW - 1)) is not None:
            start = time.perf_counter()
            way = self.ways[name]
            way.wait()
            self.watching.close()
            if not way.memory:
                way.memory.append(way.held() + self.grown[0])
            clear(self.path, way)
            self.began += time.perf_counter() - start

    def _way(self, number: int) -> str | None:
        index = number // 2 - 1
        return self.schedule[index] if number % 2 == 0 and 0 <= index < len(self.schedule) else None

    def settle(self) -> None:
        """What each save has lost, against the windows before and after it: machines drift."""
        for (_, before), (name, seconds), (_, after) in zip(
            self.windows, self.windows[1:], self.windows[2:], strict=False
        ):
            if name is not None:
                self.ways[name].lost.append(seconds - (before + after) / 2)


class Alone(pl.Callback):
    """At the end of training, with all state there: durable, memory and load, with nobody training."""

    def __init__(self, ways: dict[str, Way], directory: Path, turns: int, megabytes: int, limits: Limits) -> None:
        self.ways, self.directory, self.turns, self.megabytes = ways, directory, turns, megabytes
        self.limits = limits

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        order: list[Way | Limits] = [self.limits, *self.ways.values()]
        for turn in range(self.turns):
            random.Random(turn).shuffle(order)  # nobody always comes after the same one
            for one in order:
                path = Path(tempfile.mkdtemp(dir=self.directory))
                if isinstance(one, Limits):
                    one.turn(path)
                    clear(path)
                else:
                    start = time.perf_counter()
                    one.save(trainer, path)
                    one.wait()
                    one.durable.append(time.perf_counter() - start)
                    self._load(one, path)
                    clear(path, one)
        for way in self.ways.values():
            path = Path(tempfile.mkdtemp(dir=self.directory))
            ctypes.CDLL(None).malloc_trim(0)  # what one way has freed is not to hide what the next takes
            with watched() as grown:
                way.save(trainer, path)
                way.wait()
            way.memory.append(way.held() + grown[0])
            clear(path, way)

    def _load(self, way: Way, path: Path) -> None:
        model = Wide(self.megabytes)
        optimizer: Any = model.configure_optimizers()
        forget(self.directory)
        start = time.perf_counter()
        way.load(path, model, optimizer)
        way.loading.append(time.perf_counter() - start)
        if not optimizer.state:
            raise RuntimeError("the optimizer's state was not loaded")


def clear(path: Path, way: Way | None = None) -> None:
    """Remove ``path``, and let the disk come to rest: what one way has left to do is not the next one's."""
    shutil.rmtree(path)
    if way is not None:
        way.clear()
    os.sync()


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """By how many bytes the memory in use grows, at its peak, within."""
    grown, before, end = [0], memory(), threading.Event()

    def watch() -> None:
        while not end.wait(0.01):
            grown[0] = max(grown[0], memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        end.set()
        watcher.join()


def memory() -> int:
    """Bytes of this machine that hold what is in no file.

    Not what processes have mapped of it: pages that two of them share would count twice, or, after the kernel has joined
    them to large ones, not at all until they are used again.
    """
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("AnonPages", "Shmem"))


class Clock(pl.Callback):
    """The time of every step, from the tenth on."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        now = time.perf_counter()
        if trainer.global_step > 10:
            self.steps.append(now - self.began)
        self.began = now


class Enough(Exception):
    """The first step is done."""


class OneStep(pl.Callback):
    """Ends the run after its first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        raise Enough


def until_the_first_step(directory: Path, megabytes: int, turns: int) -> dict[str, float]:
    """From the call to the end of the first step: of a new run, and of resumed ones, files not in the page cache."""
    file, keep = directory / "lightning.ckpt", {"monitor": None, "save_top_k": 1, "verbose": False}

    def plain(trainer: pl.Trainer, path: Path | None = None) -> None:
        trainer.fit(Wide(megabytes), data(), ckpt_path=path, weights_only=False)

    def ours(trainer: pl.Trainer) -> None:
        log = NeMoLogger(explicit_log_dir=directory / "run", ckpt=ModelCheckpoint(**keep))
        resume = AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
        nemologger.train(Wide(megabytes), data(), trainer, log, resume)

    ours(trainer_for(2))
    saved = trainer_for(2)
    plain(saved)
    saved.save_checkpoint(file)
    starts: dict[str, Callable[[pl.Trainer], object]] = {
        "a new run": plain,
        "nemologger.train, verified": ours,
        "Lightning, fit(ckpt_path=...)": lambda trainer: plain(trainer, file),
    }
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(turns):
        for name, start in starts.items():
            forget(directory)
            began = time.perf_counter()
            with contextlib.suppress(Enough):
                start(trainer_for(9, [OneStep()]))
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def without_a_save(directory: Path, megabytes: int, turns: int) -> dict[str, float]:
    """Steps without a save, with our callback and without, fits taking turns."""
    seconds: dict[str, list[float]] = {"with the callback": [], "plain Lightning": []}
    for turn in range(turns):
        for name, found in seconds.items():
            ours = ModelCheckpoint(
                dirpath=directory / f"never-{turn}", monitor=None, every_n_train_steps=10**9, async_save=True
            )
            clock = Clock()
            trainer = trainer_for(60, [clock, *([ours] if name == "with the callback" else [])])
            trainer.fit(Wide(megabytes), data())
            found.append(statistics.median(clock.steps))
    return {name: statistics.median(found) for name, found in seconds.items()}


def trainer_for(steps: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), enable_model_summary=False,
        callbacks=list(callbacks),
    )  # fmt: skip


def data() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(100_000, 4), batch_size=8)


def figures(ways: dict[str, Way]) -> dict[str, dict[str, float]]:
    """Medians, by way."""
    return {
        name: {
            "stall": statistics.median(way.stall),
            "first stall": way.stall[0],
            "lost": statistics.median(way.lost),
            "durable": statistics.median(way.durable),
            "load": statistics.median(way.loading),
            "memory": max(way.memory) / 1e6,
        }
        for name, way in ways.items()
    }


def draw(table: dict[str, dict[str, float]], limit: dict[str, float], path: Path) -> None:
    """The table as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture without matplotlib: pip install "nemologger[bench]"')
        return
    shown = {"stall": "memcpy", "lost": "memcpy", "durable": "durable write", "load": "read"}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, (key, bound) in zip(figure.subplots(1, len(shown), sharey=True), shown.items(), strict=True):
        colours = ["tab:green" if name.startswith("nemologger") else "tab:grey" for name in table]
        bars = axes.barh(list(table), [max(row[key], 0.0) for row in table.values()], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(limit[bound], color="tab:red", linestyle=":", label=bound)
        axes.set_title(f"{key}, s")
        axes.margins(x=0.2)
        axes.legend(fontsize="small")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the state, fewer turns")
    parser.add_argument("--turns", type=int, help="of each way; default 3, and 1 with --small")
    parser.add_argument("--only", default="", help="the ways that have this in their names")
    parser.add_argument("--out", type=Path, default=Path(), help="where saving.json and saving.png go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the minutes that it takes
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("nemologger").setLevel(
        logging.ERROR
    )  # it would say that checkpoints vanish: clear() removes them
    torch.set_num_threads(2)
    megabytes, turns = (60, 1) if arguments.small else (1060, 3)
    turns = arguments.turns or turns
    directory = Path(tempfile.mkdtemp(prefix="nemologger-bench-", dir="."))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # dcp.async_save wants one
    ways: dict[str, Way] = {}
    try:
        ours = {
            "nemologger, async": Ours(directory, 1, beside=True),
            "nemologger, async, overlapped": Ours(directory, 2, beside=True, staging="overlapped"),
            "nemologger, sync": Ours(directory, 3, beside=False),
        }
        others, missing = peers(arguments.only)
        ways = {name: one.way() for name, one in ours.items() if arguments.only in name} | others
        measure = Measure(ways, directory, turns)
        limits = Limits(megabytes * 1_000_000)
        alone = Alone(ways, directory, turns, megabytes, limits)
        trainer = trainer_for(measure.steps, [alone, measure, *(one.callback for one in ours.values())])
        trainer.fit(Wide(megabytes), data())
        measure.settle()
        limit = limits.medians()
        steps = without_a_save(directory, megabytes, turns)
        first = until_the_first_step(directory, megabytes, turns)
    finally:
        close(ways)
        dist.destroy_process_group()
        shutil.rmtree(directory)
    table = figures(ways)
    print(f"\n{megabytes} MB of state. Limits: " + ", ".join(f"{name} {value:.3f}" for name, value in limit.items()))
    print("Steps without a save: " + ", ".join(f"{name} {value:.4f}" for name, value in steps.items()))
    print("Until the first step: " + ", ".join(f"{name} {value:.3f}" for name, value in first.items()))
    print(*(f"not there: {line}" for line in missing), sep="\n")
    print("\n| seconds | stall | first stall | lost | durable | load | memory, MB |\n|---|---|---|---|---|---|---|")
    for name, row in table.items():
        cells = [f"{value:.3f}" if key != "memory" else f"{value:.0f}" for key, value in row.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    result = {
        "megabytes": megabytes,
        "limits": limit,
        "steps without a save": steps,
        "first step": first,
        "ways": table,
    }
    (arguments.out / "saving.json").write_text(json.dumps(result, indent=1))
    draw(table, limit, arguments.out / "saving.png")


if __name__ == "__main__":
    main()
