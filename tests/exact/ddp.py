"""For ``torchrun``: every case of :mod:`exact.test_ddp` on its ranks, each step, each rank's own losses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exact.loaders.test_loaders import FlaggedStream, LazySampler
from exact.runs import BATCH, Augmented, Case, Net, check, shuffled
from exact.test_module_hooks import AfterAll
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader, get_worker_info
from torchmetrics import MeanMetric

from nemologger.strategies import FSDP2Strategy, FSDPStrategy

DDP = {"devices": int(os.environ.get("WORLD_SIZE", "1")), "strategy": "ddp"}
SHARDED = {"devices": 2, "strategy": FSDP2Strategy}
SPLIT = {
    "devices": 2,
    "strategy": lambda: FSDP2Strategy(
        tensor_parallel_size=2, tp_shard_plan={"net.0": ColwiseParallel(), "net.2": RowwiseParallel()}
    ),
}
EPOCHS = {**DDP, "max_epochs": 3, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}


class PerRank(FlaggedStream):
    """Every rank has other samples."""

    def __iter__(self):
        assert get_worker_info() is None
        return (sample + dist.get_rank() for sample in super().__iter__())


class Remembers(Net):
    """Keeps what a rank has seen in a buffer, and its losses depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.lerp_(batch.mean(), 0.1)
        return self.note(self.loss(batch) * (1 + self.seen))


class RemembersByHand(Remembers):
    """With manual optimization the ranks keep their buffers for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.register_buffer("before", torch.zeros(()), persistent=False)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.before.copy_(self.seen)
        self.seen.lerp_(batch.mean(), 0.1)
        loss = self.loss(batch) * (1 + self.seen + self.before)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return self.note(loss.detach())


class Measures(Callback):
    """Its state is a number; what its metric has counted, by which each rank weighs its losses, is not in it."""

    def __init__(self) -> None:
        self.metric, self.batches = MeanMetric(), 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.metric.update(batch.mean())
        batch.mul_(1 + self.metric.mean_value / self.metric.weight)


CASES = {
    "metric of a callback": Case(
        lambda: shuffled(batch_size=2), trainer=DDP, at=(3, 5, 7), callbacks=lambda: [Measures()]
    ),
    "shuffle": Case(lambda: shuffled(batch_size=2), trainer=DDP, at=(1, 3, 5, 6, 7)),
    "in order, epochs": Case(lambda: DataLoader(Augmented(), batch_size=2), trainer=EPOCHS, at=(1, 3, 5, 6, 7, 12, 13)),
    "own sampler": Case(shuffled, trainer={**DDP, "use_distributed_sampler": False}, at=(1, 3, 5, 6, 7)),
    "lazy sampler": Case(
        lambda: DataLoader(Augmented(), batch_size=2, sampler=LazySampler()), trainer=DDP, at=(1, 5, 6, 7)
    ),
    "stream": Case(lambda: DataLoader(PerRank(), batch_size=BATCH), trainer=DDP, at=(1, 3, 5, 6, 7)),
    "FSDP2": Case(lambda: shuffled(batch_size=2), Remembers, trainer=SHARDED, ckpt={"async_save": True}, at=(1, 6, 7)),
    "tensor parallel": Case(lambda: shuffled(batch_size=2), trainer=SPLIT, at=(1, 6, 7), same_seed=True),
    "stream beside": Case(
        lambda: {"a": shuffled(batch_size=2), "b": DataLoader(PerRank(), batch_size=BATCH)},
        trainer={**EPOCHS, "limit_val_batches": 0},
        at=(6, 12),
    ),
    "by hand": Case(lambda: shuffled(batch_size=2), RemembersByHand, trainer=DDP, at=(3, 5, 6)),
    "module's own hooks": Case(
        lambda: shuffled(batch_size=2), AfterAll, trainer=DDP, ckpt={"async_save": True}, at=(3, 5)
    ),
    "workers": Case(lambda: shuffled(batch_size=2, num_workers=1), trainer=DDP, at=(7,)),
}


def on_gpu(**trainer: Any) -> Case:
    return Case(
        lambda: shuffled(batch_size=1, num_workers=1, pin_memory=True),
        trainer={**DDP, "accelerator": "gpu", "deterministic": True, "max_steps": 14, **trainer},
        ckpt={"async_save": True},
        at=(1, 3, 7, 11),
    )


def gpu_cases() -> dict[str, Case]:
    # Its scale grows until gradients overflow, which leaves steps out.
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20, growth_interval=3)
    return {
        "GPU": on_gpu(),
        "GPU, 16-mixed": on_gpu(plugins=[MixedPrecision("16-mixed", "cuda", scaler)]),
        "GPU, bf16-mixed": on_gpu(precision="bf16-mixed"),
        "GPU, FSDP2": on_gpu(strategy=FSDP2Strategy),
        "GPU, FSDP": on_gpu(strategy=FSDPStrategy),
    }


def main() -> None:
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    cases = {**CASES, **gpu_cases()} if torch.cuda.is_available() else CASES
    for name in names:
        check(cases[name], directory / name)


if __name__ == "__main__":
    main()
