"""What a save costs training: real ``Trainer.fit`` of a model of about 1 GB of state, one way of saving after the other.

    python benchmarks/saving.py            # a few minutes
    python benchmarks/saving.py --small    # under a minute

``stall`` is how long the training thread is blocked, ``lost`` the wall time that the steps around a save take longer than
steps without one (what the writer takes from the processor included: the honest figure), ``durable`` the time until the
bytes are safe on disk. The ways take turns in one fit; figures are medians, in seconds; the first save counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader

from nemologger import ModelCheckpoint
from nemologger.direct_file import open_direct, write_pages

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


@dataclass
class Way:
    """A way to save: ``save(trainer, directory)`` blocks training, ``wait()`` until all is durable."""

    save: Callable[[pl.Trainer, Path], object]
    wait: Callable[[], object] = lambda: None
    stall: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)


def fsync(path: Path) -> None:
    """Make what others have written durable, as ours is."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def state_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The whole checkpoint, as each way saves it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


class Ours:
    """Our callback, asked to save at certain steps."""

    def __init__(self, directory: Path, *, beside: bool) -> None:
        self.callback = ModelCheckpoint(
            dirpath=directory / f"ours-{beside}", filename="{step}", monitor=None, save_top_k=1, save_last=False,
            every_n_train_steps=10**9 + beside, async_save=beside, verbose=False, exact_resume=False,
        )  # fmt: skip
        self.trainer: pl.Trainer | None = None

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        self.trainer = trainer
        self.callback._save(trainer)

    def wait(self) -> None:
        self.callback._finish(self.trainer, final=False)


class Peers:
    """Lightning's and torch's ways."""

    def __init__(self) -> None:
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())
        self.path = Path()
        self.response: Any = None

    def lightning(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path / "x.ckpt")
        fsync(path / "x.ckpt")

    def lightning_beside(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "x.ckpt"
        state = state_of(trainer)
        self.plugin.save_checkpoint(_copied(state), self.path)

    def wait_lightning(self) -> None:
        self.plugin._executor.shutdown(wait=True)
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())
        fsync(self.path)

    def dcp_save(self, trainer: pl.Trainer, path: Path) -> None:
        dcp.save(state_of(trainer), checkpoint_id=str(path / "dcp"))
        fsync(path / "dcp")

    def dcp_async(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "dcp"
        self.response = dcp.async_save(state_of(trainer), checkpoint_id=str(self.path))

    def wait_dcp(self) -> None:
        self.response.result()
        fsync(self.path)


def _copied(state: Any) -> Any:
    """Lightning's asynchronous plugin writes live tensors; a copy makes it correct."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


class Measure(pl.Callback):
    """Every ``WINDOW`` steps the next way saves, and every other window nobody does."""

    def __init__(self, ways: dict[str, Way], directory: Path, turns: int) -> None:
        self.ways, self.directory = ways, directory
        self.schedule = [name for _ in range(turns) for name in ways]
        self.plain: list[float] = []
        self.windows: list[tuple[str | None, float]] = []
        self.began = 0.0
        self.path = directory

    @property
    def steps(self) -> int:
        return 2 * WINDOW * (len(self.schedule) + 1)

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
        if name is not None and step < self.steps:
            self._save(trainer, self.ways[name])

    def _way(self, number: int) -> str | None:
        index = number // 2 - 1
        return self.schedule[index] if number % 2 == 0 and 0 <= index < len(self.schedule) else None

    def _save(self, trainer: pl.Trainer, way: Way) -> None:
        path = self.path = Path(tempfile.mkdtemp(dir=self.directory))
        start = time.perf_counter()
        way.save(trainer, path)
        way.stall.append(time.perf_counter() - start)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # The window of a save is over: whatever is still being written is waited for outside of all figures.
        step = trainer.global_step
        if step and step % WINDOW == 0 and (name := self._way(step // WINDOW - 1)) is not None:
            start = time.perf_counter()
            self.ways[name].wait()
            shutil.rmtree(self.path)  # else what others write to the page cache piles up
            self.began += time.perf_counter() - start

    def figures(self) -> dict[str, dict[str, float]]:
        plain = statistics.median(seconds for name, seconds in self.windows if name is None)
        for name, seconds in self.windows:
            if name is not None:
                self.ways[name].lost.append(seconds - plain)
        return {
            name: {
                "stall": statistics.median(way.stall),
                "first stall": way.stall[0],
                "lost": statistics.median(way.lost),
                "durable": statistics.median(way.durable),
            }
            for name, way in self.ways.items()
        }


def durable(trainer: pl.Trainer, ways: dict[str, Way], directory: Path, turns: int) -> None:
    """Call until safe on disk, with nobody training meanwhile."""
    for _ in range(turns):
        for way in ways.values():
            path = Path(tempfile.mkdtemp(dir=directory))
            trainer.callbacks[0].forget()
            start = time.perf_counter()
            way.save(trainer, path)
            way.wait()
            way.durable.append(time.perf_counter() - start)
            shutil.rmtree(path)


class Durable(pl.Callback):
    """At the end of training, with all state there."""

    def __init__(self, ways: dict[str, Way], ours: list[Ours], directory: Path, turns: int) -> None:
        self.ways, self.ours, self.directory, self.turns = ways, ours, directory, turns

    def forget(self) -> None:
        """Let our callbacks save the same step once more."""
        for way in self.ours:
            way.callback._last_global_step_saved = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        durable(trainer, self.ways, self.directory, self.turns)


def limits(directory: Path, megabytes: int, turns: int) -> dict[str, float]:
    """Copying as much into memory touched before, and the best durable write of it."""
    import mmap

    size = megabytes * 1_000_000 // mmap.PAGESIZE * mmap.PAGESIZE
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    copies, writes = [], []
    with mmap.mmap(-1, size) as memory:
        memory[:] = bytes(size)
        for _ in range(turns + 1):
            start = time.perf_counter()
            target.copy_(source)
            copies.append(time.perf_counter() - start)
            start = time.perf_counter()
            descriptor = open_direct(directory / "raw") or os.open(directory / "raw", os.O_CREAT | os.O_WRONLY)
            view = memoryview(memory)
            write_pages(descriptor, view, size)
            view.release()
            os.close(descriptor)
            writes.append(time.perf_counter() - start)
    return {"memcpy": statistics.median(copies[1:]), "durable write": statistics.median(writes[1:])}


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tenth of the state, fewer turns")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    megabytes, turns = (100, 2) if arguments.small else (1060, 3)
    directory = Path(tempfile.mkdtemp(prefix="nemologger-bench-", dir="."))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # dcp.async_save wants one
    try:
        beside, waiting, peers = Ours(directory, beside=True), Ours(directory, beside=False), Peers()
        ways = {
            "nemologger, async": Way(beside.save, beside.wait),
            "nemologger, sync": Way(waiting.save, waiting.wait),
            "Lightning, sync": Way(peers.lightning),
            "Lightning, AsyncCheckpointIO": Way(peers.lightning_beside, peers.wait_lightning),
            "dcp.save": Way(peers.dcp_save),
            "dcp.async_save": Way(peers.dcp_async, peers.wait_dcp),
        }
        measure = Measure(ways, directory, turns)
        last = Durable(ways, [beside, waiting], directory, turns)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=measure.steps, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[last, measure, beside.callback, waiting.callback],
        )  # fmt: skip
        data = DataLoader(torch.ones(100_000, 4), batch_size=8)
        trainer.fit(Wide(megabytes), data)
        figures = measure.figures()
        limit = limits(directory, megabytes, turns)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(directory)
    print(
        f"{megabytes} MB of state; limits: memcpy {limit['memcpy']:.3f}, durable write {limit['durable write']:.3f}\n"
    )
    print("| seconds | stall | first stall | lost | durable |\n|---|---|---|---|---|")
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.3f}" for key in row) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"limits": limit, **figures}, indent=1))


if __name__ == "__main__":
    main()
