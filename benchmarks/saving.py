"""What a save costs training: real ``Trainer.fit`` of a model of about 1 GB of state, one way of saving after the other.

    pip install "nemologger[bench]"
    python benchmarks/saving.py            # some minutes; writes saving.json and saving.png
    python benchmarks/saving.py --small    # under a minute

``stall`` is how long the training thread is blocked, ``lost`` the wall time that the steps around a save take longer than
the steps beside them (what the writer takes from the processor included: the honest figure), ``durable`` the time
until the bytes are safe on disk with nobody training, ``load`` the time into a fresh model and optimizer from a cold page
cache (ours with checksums), ``memory`` the memory that a save needs beside the state, at its peak. The ways take turns in
one fit; figures are medians, in seconds; the first save counts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from ways import Ours, Way, close, peers

from nemologger import ModelCheckpoint
from nemologger.direct_file import open_direct, write_pages
from nemologger.pages import own_pages

WINDOW = 6
BLOCK = 16 << 20


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
            shutil.rmtree(self.path)  # else what others write to the page cache piles up
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

    def __init__(self, ways: dict[str, Way], directory: Path, turns: int, megabytes: int) -> None:
        self.ways, self.directory, self.turns, self.megabytes = ways, directory, turns, megabytes

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for _ in range(self.turns):
            for way in self.ways.values():
                path = Path(tempfile.mkdtemp(dir=self.directory))
                start = time.perf_counter()
                way.save(trainer, path)
                way.wait()
                way.durable.append(time.perf_counter() - start)
                self._load(way, path)
                shutil.rmtree(path)
        for way in self.ways.values():
            path = Path(tempfile.mkdtemp(dir=self.directory))
            ctypes.CDLL(None).malloc_trim(0)  # what one way has freed is not to hide what the next takes
            with watched() as grown:
                way.save(trainer, path)
                way.wait()
            way.memory.append(way.held() + grown[0])
            shutil.rmtree(path)

    def _load(self, way: Way, path: Path) -> None:
        model = Wide(self.megabytes)
        optimizer: Any = model.configure_optimizers()
        forget(self.directory)
        start = time.perf_counter()
        way.load(path, model, optimizer)
        way.loading.append(time.perf_counter() - start)
        if not optimizer.state:
            raise RuntimeError("the optimizer's state was not loaded")


def forget(directory: Path) -> None:
    """Drop what the page cache has of the files below ``directory``."""
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """By how many bytes the memory of this process and of those it has started grows, at its peak, within."""
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
    """Resident bytes of this process, and those of the processes it has started that are not shared."""
    total = 0
    own = str(os.getpid())
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    for pid in (own, *children):
        with contextlib.suppress(OSError):  # it has ended
            _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
            total += resident if pid == own else resident - shared
    return total * mmap.PAGESIZE


def limits(directory: Path, megabytes: int, turns: int) -> dict[str, float]:
    """Copying as much into memory touched before, the best durable write of it, and the best read into it."""
    size = megabytes * 1_000_000 // mmap.PAGESIZE * mmap.PAGESIZE
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    figures: dict[str, list[float]] = {"memcpy": [], "durable write": [], "read": []}
    path = directory / "raw"
    with own_pages(size) as pages, ThreadPoolExecutor(4) as pool:
        pages[:] = bytes(size)
        view = memoryview(pages)
        for _ in range(turns + 1):
            start = time.perf_counter()
            target.copy_(source)
            figures["memcpy"].append(time.perf_counter() - start)
            start = time.perf_counter()
            descriptor = open_direct(path) or os.open(path, os.O_CREAT | os.O_WRONLY)
            write_pages(descriptor, view, size)
            os.close(descriptor)
            figures["durable write"].append(time.perf_counter() - start)
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            start = time.perf_counter()
            list(pool.map(lambda at: os.preadv(descriptor, [view[at : at + BLOCK]], at), range(0, size, BLOCK)))  # noqa: B023
            figures["read"].append(time.perf_counter() - start)
            os.close(descriptor)
        view.release()
    return {name: statistics.median(seconds[1:]) for name, seconds in figures.items()}


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


def without_a_save(directory: Path, megabytes: int, turns: int) -> dict[str, float]:
    """Steps without a save, with our callback and without, fits taking turns."""
    seconds: dict[str, list[float]] = {"with the callback": [], "plain Lightning": []}
    for turn in range(turns):
        for name, found in seconds.items():
            ours = ModelCheckpoint(
                dirpath=directory / f"never-{turn}", monitor=None, every_n_train_steps=10**9, async_save=True
            )
            clock = Clock()
            fit(Wide(megabytes), 60, [clock, *([ours] if name == "with the callback" else [])])
            found.append(statistics.median(clock.steps))
    return {name: statistics.median(found) for name, found in seconds.items()}


def fit(model: Wide, steps: int, callbacks: list[pl.Callback]) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), enable_model_summary=False,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(model, DataLoader(torch.ones(100_000, 4), batch_size=8))


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
    parser.add_argument("--out", type=Path, default=Path(), help="where saving.json and saving.png go")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    megabytes, turns = (60, 1) if arguments.small else (1060, 5)
    directory = Path(tempfile.mkdtemp(prefix="nemologger-bench-", dir="."))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # dcp.async_save wants one
    ways: dict[str, Way] = {}
    try:
        ours = {
            "nemologger, async": Ours(directory, 1, beside=True),
            "nemologger, async, overlapped": Ours(directory, 2, beside=True, staging="overlapped"),
            "nemologger, sync": Ours(directory, 3, beside=False),
        }
        others, missing = peers()
        ways = {name: one.way() for name, one in ours.items()} | others
        measure = Measure(ways, directory, turns)
        alone = Alone(ways, directory, turns, megabytes)
        fit(Wide(megabytes), measure.steps, [alone, measure, *(one.callback for one in ours.values())])
        measure.settle()
        limit = limits(directory, megabytes, turns)
        steps = without_a_save(directory, megabytes, turns)
    finally:
        close(ways)
        dist.destroy_process_group()
        shutil.rmtree(directory)
    table = figures(ways)
    print(f"\n{megabytes} MB of state. Limits: " + ", ".join(f"{name} {value:.3f}" for name, value in limit.items()))
    print("Steps without a save: " + ", ".join(f"{name} {value:.4f}" for name, value in steps.items()))
    print(*(f"not there: {line}" for line in missing), sep="\n")
    print("\n| seconds | stall | first stall | lost | durable | load | memory, MB |\n|---|---|---|---|---|---|---|")
    for name, row in table.items():
        cells = [f"{value:.3f}" if key != "memory" else f"{value:.0f}" for key, value in row.items()]
        print(f"| {name} | " + " | ".join(cells) + " |")
    result = {"megabytes": megabytes, "limits": limit, "steps without a save": steps, "ways": table}
    (arguments.out / "saving.json").write_text(json.dumps(result, indent=1))
    draw(table, limit, arguments.out / "saving.png")


if __name__ == "__main__":
    main()
