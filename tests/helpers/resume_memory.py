"""How much memory a resume takes: ``resume_memory.py CHECKPOINT`` prints the peak, as a multiple of the state."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from toy import quiet_trainer

from nemologger import AutoResume, ModelCheckpoint

WIDTH, LAYERS = 1024, 6


class Wide(pl.LightningModule):
    """A third of its state is the model, the rest is Adam's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Stop(pl.Callback):
    """Training is about to start: takes the peak, and ends it."""

    peak = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak = _memory("VmHWM") - _memory("RssFile")
        trainer.should_stop = True
        trainer.limit_train_batches = 0


def fit(directory: Path, model: Wide, resume: Path | None = None, *, steps: int = 1) -> Stop:
    """Train, and save the last step as ``x``."""
    stop = Stop()
    saves = ModelCheckpoint(dirpath=directory, filename="x", monitor=None, save_last=False, every_n_train_steps=1)
    trainer = quiet_trainer(max_steps=steps, callbacks=[saves, *([] if resume is None else [stop])])
    if resume is not None:
        AutoResume(resume_from_path=resume).setup(trainer, model)
    width = model.net[0].in_features
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, width), batch_size=2))
    return stop


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(checkpoint: Path) -> None:
    """Print the peak."""
    small = checkpoint.parent / "small"
    fit(small, Wide(8))
    fit(small / "again", Wide(8), small / "x", steps=2)  # everything is imported now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS") - _memory("RssFile")  # pages of libraries come and go
    stop = fit(checkpoint.parent / "again", Wide(), checkpoint, steps=2)
    print((stop.peak - before) / (3 * 4 * LAYERS * WIDTH**2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
