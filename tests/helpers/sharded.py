"""Every way to spread a model over ranks: each saves, then each loads what the others saved.

Run by ``torchrun`` with 1, 2 and 4 ranks at the same time: ``sharded.py DIRECTORY WORLD...``, where ``WORLD...`` are the
numbers of ranks that take part. A save of ``<kind>`` on ``<n>`` ranks is ``DIRECTORY/saved/<kind>-<n>``; what was trained,
in full and by name, is ``DIRECTORY/state/<kind>-<n>.pt``, and what ``<kind>-<n>`` loaded of it ``DIRECTORY/loaded/...pt``.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from processes import wait_for
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader
from toy import BATCH, ToyData

from nemologger import ModelCheckpoint, lightning_port, sharded_state
from nemologger.callbacks import EMA
from nemologger.strategies import DDPStrategy, FSDP2Strategy, FSDPStrategy

#: The ways to spread a model, by number of ranks. ``tp2`` splits layers in two; on four ranks FSDP2 shards the halves.
KINDS = {1: ["ddp"], 2: ["ddp", "fsdp2", "tp2", "fsdp", "lightning"], 4: ["ddp", "fsdp2", "tp2"]}
STEPS = 3
#: Of these runs the checkpoint before the last gives up its optimizer state.
THINNED = ("fsdp2", "tp2")


class Model(pl.LightningModule):
    """Sizes that two and four ranks do not divide, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 1)])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.relu(self.up(batch)))
        for block in self.blocks:
            hidden = block(torch.tanh(hidden))
        return hidden

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen += 1
        return (self(batch) - 1).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"}]


class ShardsItself(Model):
    """As Lightning's ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            for part in (self.up, self.down, *self.blocks):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class FSDPOnCPU(FSDPStrategy):
    """Lightning gives FSDP no device on the CPU, and it looks for a GPU then."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def strategy_of(kind: str, world: int) -> Strategy | str:
    if kind == "ddp":
        return DDPStrategy() if world > 1 else "auto"
    if kind == "fsdp":
        return FSDPOnCPU()
    if kind == "lightning":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    if kind == "fsdp2":
        return FSDP2Strategy(ckpt_async_save=world == 2)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return FSDP2Strategy(tensor_parallel_size=2, tp_shard_plan=plan)


class Keep(pl.Callback):
    """Writes down the state at the beginning or the end of training."""

    def __init__(self, file: Path, at: str) -> None:
        self.file, self.at = file, at

    def on_train_start(self, trainer, pl_module):
        if self.at == "start":
            self.keep(trainer)

    def on_train_end(self, trainer, pl_module):
        if self.at == "end":
            self.keep(trainer)

    def keep(self, trainer: pl.Trainer) -> None:
        model = {name: whole(tensor) for name, tensor in sharded_state.model_state(trainer.strategy).items()}
        with sharded_state.kept_in_place(trainer.strategy):
            states = [trainer.strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
        names = lightning_port.optimizer_names(trainer)
        optimizer = {
            f"{name_of[i]}.{field}": whole(value)
            for state, name_of in zip(states, names, strict=True)
            for i, fields in state["state"].items()
            for field, value in fields.items()
        }
        averages = averages_of(trainer)
        scheduler = trainer.lr_scheduler_configs[0].scheduler.state_dict()
        if trainer.is_global_zero:
            state = {
                "model": model,
                "optimizer": optimizer,
                "averages": averages,
                "scheduler": {key: scheduler[key] for key in ("last_epoch", "_last_lr")},
                "global_step": trainer.global_step,
                "consumed_samples": trainer.checkpoint_callback.consumed_samples,
            }
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, self.file)


class EnoughSeen(Exception):
    """What was loaded is written down: there is no need to train."""


class LooksOnly(pl.Callback):
    """Ends training before its first step."""

    def on_train_start(self, trainer, pl_module):
        raise EnoughSeen


def averages_of(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    """Those that a callback keeps of the parameters, in full."""
    ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
    if ema is None:
        return {}
    averages = ema.averages
    if sharded_state.flattened(trainer.strategy) is not None:
        with ema._averages.exchanged(trainer.strategy):
            averages = {n: t for n, t in sharded_state.model_state(trainer.strategy).items() if n in averages}
    return {name: whole(tensor) for name, tensor in averages.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().clone()
    if hasattr(tensor, "local_shards"):
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        here = [(tuple(shard.metadata.shard_offsets), shard.tensor.detach()) for shard in tensor.local_shards()]
        torch.distributed.all_gather_object(ranks, here)
        full = torch.empty(tensor.shape, dtype=here[0][1].dtype if here else torch.float32)
        for offsets, part in (one for rank in ranks for one in rank):
            full[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
        return full
    return tensor.detach().clone()


def differences(found: dict, wanted: dict) -> list[str]:
    """The names of what is not equal, bit for bit."""
    wrong = [key for key in ("scheduler", "global_step", "consumed_samples") if found[key] != wanted[key]]
    for part in ("model", "optimizer", "averages"):
        assert wanted[part] or part == "averages"
        assert found[part].keys() == wanted[part].keys()
        wrong += [f"{part}: {n}" for n, tensor in wanted[part].items() if not torch.equal(found[part][n], tensor)]
    return wrong


def fit(kind: str, world: int, keep: Keep, directory: Path, steps: int, load: Path | None = None) -> None:
    """Train with a plain Lightning Trainer and our callback."""
    trainer = pl.Trainer(
        max_steps=steps,
        devices=world,
        accelerator="cpu",
        strategy=strategy_of(kind, world),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(
                monitor=None,
                dirpath=directory,
                filename="{step}",
                every_n_train_steps=2,
                save_last=False,
                save_last_n_optim_states=1 if kind in THINNED else -1,
                verbose=False,
            ),
            EMA(0.5),
            keep,
            *([] if load is None else [LooksOnly()]),
        ],
    )
    model = (ShardsItself if kind == "lightning" else Model)()
    data = DataLoader(ToyData(), batch_size=BATCH, shuffle=True)
    with suppress(EnoughSeen):
        trainer.fit(model, data, ckpt_path=load)


def main(directory: Path, worlds: list[int]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    for kind in KINDS[world]:
        name = f"{kind}-{world}"
        fit(kind, world, Keep(directory / "state" / f"{name}.pt", "end"), directory / "saved" / name, STEPS)
    saved = [f"{kind}-{n}" for n in worlds for kind in KINDS[n]]
    wait_for(
        lambda: all((directory / "saved" / name / f"step={STEPS}" / "manifest.json").exists() for name in saved), 240
    )
    for kind in KINDS[world]:
        for name in saved:
            keep = Keep(directory / "loaded" / f"{name}-as-{kind}-{world}.pt", "start")
            load = directory / "saved" / name / f"step={STEPS}"
            fit(kind, world, keep, directory / "again" / f"{name}-as-{kind}-{world}", STEPS + 1, load)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]])
