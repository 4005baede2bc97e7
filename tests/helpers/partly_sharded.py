"""Two ranks of FSDP2 train modules that shard a part of themselves: ``partly_sharded.py DIRECTORY``, run by ``torchrun``.

Each rank writes what it has seen, by class, into ``DIRECTORY/rank<n>.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from helpers.sharded import whole
from helpers.sharded_models import Plain, loader, trainer_of
from nemologger.strategies import FSDP2Strategy


class ShardsBlocks(Plain):
    """In its configure_model, and leaves it at that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))  # of no dimensions: FSDP2 cannot shard it
        self.down.bias.requires_grad_(False)

    def configure_model(self) -> None:
        for block in self.blocks:
            if not isinstance(block, FSDPModule):
                fully_shard(block, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * self.scale


class SyncsItself(ShardsBlocks):
    """What it has not sharded."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2


class LogsGradients(ShardsBlocks):
    """And does nothing else to them."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("norm", torch.stack([whole(p.grad).norm() for p in self.parameters() if p.grad is not None]).norm())


class StepsItself(ShardsBlocks):
    """With the gradients of what it has not sharded averaged, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for parameter in (self.scale, *self.up.parameters(), self.down.weight):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        optimizer.step()


class HoldsStill(ShardsBlocks):
    """A hook keeps a bias where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up.bias.register_hook(torch.zeros_like)


def trained(model: pl.LightningModule) -> dict[str, Any]:
    """What is not sharded, what was said, and of each parameter its sum and how much that has changed, on this rank."""
    said: list[str] = []
    before = {name: float(parameter.double().sum()) for name, parameter in model.named_parameters()}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    log = logging.getLogger("nemologger.strategies")
    log.addHandler(handler)
    log.setLevel("INFO")
    try:
        trainer_of(FSDP2Strategy(), None, 3).fit(model, loader())
    finally:
        log.removeHandler(handler)
        log.setLevel("NOTSET")
    sums = {name: float(whole(parameter).double().sum()) for name, parameter in model.named_parameters()}
    return {
        "whole": [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)],
        "said": said,
        "sums": sums,
        "moved": {name: abs(end - before[name]) for name, end in sums.items()},
    }


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    kinds = (ShardsBlocks, SyncsItself, LogsGradients, StepsItself, HoldsStill)
    seen = {kind.__name__: trained(kind()) for kind in kinds}
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
