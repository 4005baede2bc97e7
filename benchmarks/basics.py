"""What the first version costs, each figure as a ratio to raw torch or Lightning work of the same run.

    python benchmarks/basics.py            # about two minutes
    python benchmarks/basics.py --small    # half a minute, for a quick look

The two sides of a ratio take turns, and each ratio is of one turn; the table has their medians.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemologger import ModelCheckpoint, NeMoLogger
from nemologger.callbacks import DeltaTimingCallback, PreemptionCallback, TimingCallback
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.load import load_checkpoint, open_verified
from nemologger.checkpoint.state import snapshot
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import LocalDisk
from nemologger.ranks import SingleProcess


def state(megabytes: int) -> dict[str, Any]:
    """A model and its Adam state, as Lightning's checkpoint dictionary, of about so many megabytes."""
    width = int((megabytes * 1e6 / 4 / 3 / 8) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}


def torch_save(checkpoint: dict[str, Any], path: Path) -> None:
    """What Lightning does, made durable."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call: on the wall, unless told."""
    start = clock()
    work()
    return clock() - start


def alternate(
    turns: int,
    ours: Callable[[], object],
    raw: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Medians of both, of the ratio and of the difference turn by turn. One turn more goes first and does not count."""
    pairs = [(seconds(ours, clock), seconds(raw, clock)) for _ in range(turns + 1)][1:]
    return {
        "more": statistics.median(a - b for a, b in pairs),
        "ours": statistics.median(a for a, _ in pairs),
        "raw": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def python(code: str) -> None:
    """Run ``code`` in a fresh interpreter."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stdout=subprocess.DEVNULL)


def saving_and_loading(directory: Path, megabytes: int, turns: int) -> dict[str, dict[str, float]]:
    """Save, load, and verify against torch.save with fsync, and torch.load."""
    checkpoint = state(megabytes)
    saver = Saver(LocalDisk(), SingleProcess())

    def ours() -> None:
        saver.save(snapshot.take(checkpoint), directory / "ours", Manifest(step=1, epoch=0))

    def raw() -> None:
        torch_save(checkpoint, directory / "raw.ckpt")

    return {
        f"save {megabytes} MB, durable, with checksums | torch.save + fsync": alternate(turns, ours, raw),
        f"load {megabytes} MB | torch.load": alternate(
            turns, lambda: load_checkpoint(directory / "ours"), lambda: torch.load(directory / "raw.ckpt")
        ),
        f"verify {megabytes} MB and load | load": alternate(
            turns, lambda: open_verified(directory / "ours").read(), lambda: load_checkpoint(directory / "ours")
        ),
    }


def imports(turns: int) -> dict[str, dict[str, float]]:
    """``import nemologger`` on top of ``import lightning.pytorch``."""
    lightning = "import lightning.pytorch"
    names = "from nemologger import AutoResume, ModelCheckpoint, NeMoLogger, Trainer, train"
    return {
        "import lightning.pytorch, nemologger | import lightning.pytorch": alternate(
            turns, lambda: python(f"{lightning}; import nemologger"), lambda: python(lightning)
        ),
        "the same, and all its classes used | import lightning.pytorch": alternate(
            turns, lambda: python(f"{lightning}; {names}"), lambda: python(lightning)
        ),
    }


def setup(directory: Path, turns: int) -> dict[str, dict[str, float]]:
    """``NeMoLogger.setup`` against making the Trainer it sets up."""
    trainers: list[pl.Trainer] = []

    def raw() -> None:
        trainers.append(pl.Trainer(accelerator="cpu", max_steps=10, logger=False, enable_progress_bar=False))

    def ours() -> None:
        log = NeMoLogger(name="bench", log_dir=directory, version=str(len(trainers)), ckpt=ModelCheckpoint())
        log.setup(trainers[-1])

    raw()
    return {"NeMoLogger.setup (with git-info.log) | pl.Trainer()": alternate(turns, ours, raw)}


class Step(pl.LightningModule):
    """As little work as a training step can be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steps(turns: int, count: int) -> dict[str, dict[str, float]]:
    """Training steps with callbacks against steps without; no logger. Time of the CPU: the difference is small."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("nemologger").setLevel(logging.ERROR)
    data = torch.utils.data.DataLoader(torch.ones(count, 8), batch_size=1)

    def train(*callbacks: pl.Callback) -> None:
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=count, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(Step(), data)

    figures = {}
    for kind in (pl.Callback, TimingCallback, DeltaTimingCallback, PreemptionCallback):
        figure = alternate(turns, lambda kind=kind: train(kind()), train, time.process_time)
        each = figure["more"] / count * 1e6
        name = "a Callback that does nothing" if kind is pl.Callback else kind.__name__
        figures[f"{count} training steps with {name} ({each:.0f} µs a step) | without"] = figure
    return figures


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="less data, fewer turns")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    turns, megabytes = (2, 60) if arguments.small else (5, 400)

    directory = Path(tempfile.mkdtemp(prefix="nemologger-bench-"))
    try:
        figures = {
            **saving_and_loading(directory, megabytes, turns),
            **imports(turns),
            **setup(directory, turns),
            **steps(turns, 1000 if arguments.small else 4000),
        }
    finally:
        shutil.rmtree(directory)
    print("| ours \\| raw | ours, s | raw, s | ratio |\n|---|---|---|---|")
    for name, figure in figures.items():
        print(
            f"| {name.replace('|', chr(92) + '|')} | {figure['ours']:.3f} | {figure['raw']:.3f} | {figure['ratio']:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
