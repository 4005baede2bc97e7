"""What exact resume costs per batch, with a model and data so small that nothing else counts, or with longer steps.

Runs with and without it take turns in one process, and of each the step in the middle counts, which holds on a busy
machine too; the table shows medians of the runs, of their ratios and of their differences.

    python benchmarks/exact_overhead.py [--steps 1000] [--rounds 7] [--step-ms 2] [--loader state]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import nemologger as nl

SAMPLES = 4000
SIDE = 128


class Numbers(Dataset[torch.Tensor]):
    def __init__(self) -> None:
        self.values = torch.randn(SAMPLES, 8)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.values[index]


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.randn(SAMPLES, 8))


class SizedStream(Stream):
    def __len__(self) -> int:
        return SAMPLES


class StreamWithState(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.values = torch.randn(SAMPLES, 8)
        self.next = 0

    def __iter__(self) -> Any:
        while self.next < SAMPLES:
            self.next += 1
            yield self.values[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Model(pl.LightningModule):
    """Computes so many products of matrices in each step, beside what it trains."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 1)
        self.products = products
        self.matrix = torch.randn(SIDE, SIDE)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        for _ in range(self.products):
            torch.mm(self.matrix, self.matrix)
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock(pl.Callback):
    """Times steps, without the first ones, which start workers and warm up."""

    def on_train_start(self, trainer, pl_module):
        self.ends = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer, pl_module):
        self.per_step = statistics.median(end - begin for begin, end in pairwise(self.ends[100:]))


LOADERS: dict[str, Callable[[], Any]] = {
    "map, shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "map, 2 workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "iterable, sized": lambda: DataLoader(SizedStream(), batch_size=4),
    "iterable, unsized": lambda: DataLoader(Stream(), batch_size=4),
    "with state, unsized": lambda: DataLoader(StreamWithState(), batch_size=4),
}


def seconds_per_step(loader: Callable[[], Any], steps: int, exact: bool, products: int = 0) -> float:
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        ckpt = nl.ModelCheckpoint(
            monitor=None, every_n_train_steps=10**6, dirpath=directory, verbose=False, exact_resume=exact
        )
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[clock, ckpt],
        )  # fmt: skip
        trainer.fit(Model(products), loader())
    return clock.per_step


def products_in(seconds: float) -> int:
    """How many products take so long here."""
    model, batch, times = Model(200), torch.randn(4, 8), []
    for _ in range(5):
        begin = time.process_time()
        model.training_step(batch)
        times.append(time.process_time() - begin)
    return round(seconds / (min(times) / model.products))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step-ms", type=float, default=0, help="have a step take about so long, by matrix products")
    parser.add_argument("--loader", default="", help="only those with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # A step without products takes some 0.6 ms.
    products = products_in(max(0, options.step_ms - 0.6) / 1000)
    print(f"{'loader':20} {'without':>10} {'with':>10} {'more':>8} {'ratio':>8}   microseconds per step")
    for name, loader in LOADERS.items():
        if options.loader not in name:
            continue
        pairs = []
        for turn in range(options.rounds + 1):
            order = (False, True) if turn % 2 else (True, False)
            times = {exact: seconds_per_step(loader, options.steps, exact, products) for exact in order}
            pairs.append((times[False], times[True]))
        without, with_it = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        ratio, more = (statistics.median(each) for each in zip(*((b / a, b - a) for a, b in pairs[1:]), strict=True))
        print(f"{name:20} {without * 1e6:10.0f} {with_it * 1e6:10.0f} {more * 1e6:8.0f} {ratio:8.3f}", flush=True)


if __name__ == "__main__":
    main()
