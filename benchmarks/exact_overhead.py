"""What exact resume costs per batch, with a model and data so small that nothing else counts, or with longer steps.

Runs with and without it take turns in one process. Of each counts the step in the middle by the clock, and the mean of the
fastest fifth of the steps by processor time of the training thread, which hardly changes with what else the machine does.
The table shows medians of the runs, of their ratios and of their differences.

    python benchmarks/exact_overhead.py [--steps 1000] [--rounds 7] [--step-ms 2] [--loader state]

With ``--alone`` batches are only taken, without Lightning and a model: where the time goes shows there, not how much it is.
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
from nemologger.exact.loaders.session import Fit, Session

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
        self.ends.append((time.perf_counter(), time.thread_time()))

    def on_train_end(self, trainer, pl_module):
        clock, processor = (
            sorted(end - begin for begin, end in pairwise(ends)) for ends in zip(*self.ends[100:], strict=True)
        )
        self.per_step = statistics.median(clock), statistics.mean(processor[: len(processor) // 5])


LOADERS: dict[str, Callable[[], Any]] = {
    "map, shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "map, 2 workers": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "iterable, sized": lambda: DataLoader(SizedStream(), batch_size=4),
    "iterable, unsized": lambda: DataLoader(Stream(), batch_size=4),
    "with state, unsized": lambda: DataLoader(StreamWithState(), batch_size=4),
}


def seconds_per_step(loader: Callable[[], Any], steps: int, exact: bool, products: int = 0) -> tuple[float, float]:
    """By the clock, and of the training thread."""
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


class Alone(Fit):
    """A fit that trains on nothing, and takes each batch before it is done with the one before, or not."""

    rank, ranks, device = 0, 1, torch.device("cpu")

    def __init__(self, ahead: bool) -> None:
        self.ahead, self.rounds, self.all = ahead, 0, []

    def loaders(self) -> list[Any]:
        return self.all

    def trains_from(self, batches: object) -> bool:
        return True

    def fetches_ahead(self) -> bool:
        return self.ahead

    def round(self) -> int:
        self.rounds += 1
        return self.rounds

    def goes_on_within_epoch(self) -> bool:
        return False


def seconds_alone(loader: Callable[[], Any], ahead: bool, exact: bool) -> float:
    """Processor time of a batch, the mean of the fastest fifth."""
    session, batches, times = Session(fit := Alone(ahead)), loader(), []
    if exact:
        batches = session.wrap(batches)
        fit.all.append(batches)
        session.on_train_start()
    taken = iter(batches)
    for _ in range(SAMPLES // 4 - 1):
        begin = time.thread_time()
        next(taken)
        if exact:
            session.batch_trained()
        times.append(time.thread_time() - begin)
    return statistics.mean(sorted(times)[: len(times) // 5])


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
    parser.add_argument("--alone", action="store_true", help="without Lightning and a model; loaders without workers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.alone:
        for name, loader in LOADERS.items():
            if "workers" not in name and options.loader in name:
                best = [
                    min(seconds_alone(loader, "unsized" in name, exact) for _ in range(options.rounds))
                    for exact in (False, True)
                ]
                print(f"{name:20} {(best[1] - best[0]) * 1e6:8.0f} microseconds more per batch", flush=True)
        return
    # A step without products takes some 0.6 ms.
    products = products_in(max(0, options.step_ms - 0.6) / 1000)
    columns = f"{'without':>10} {'with':>8} {'more':>8} {'ratio':>8}"
    print(f"{'microseconds per step':20} {'by the clock':>36} {'of the training thread':>37}")
    print(f"{'loader':20} {columns} {columns}")
    for name, loader in LOADERS.items():
        if options.loader not in name:
            continue
        pairs = []
        for turn in range(options.rounds + 1):
            order = (False, True) if turn % 2 else (True, False)
            times = {exact: seconds_per_step(loader, options.steps, exact, products) for exact in order}
            pairs.append((times[False], times[True]))
        print(f"{name:20}", end="")
        for which in range(2):
            both = [(without[which], with_it[which]) for without, with_it in pairs[1:]]
            without, with_it = (statistics.median(column) * 1e6 for column in zip(*both, strict=True))
            ratio, more = (statistics.median(each) for each in zip(*((b / a, b - a) for a, b in both), strict=True))
            print(f" {without:10.0f} {with_it:8.0f} {more * 1e6:8.0f} {ratio:8.3f}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
