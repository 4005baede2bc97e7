"""Two ranks of FSDP2 do what users do with it: ``sharded_models.py DIRECTORY``, run by ``torchrun``.

Each rank writes what it has seen, by scenario, into ``DIRECTORY/rank<n>.json``; an error is ``Type: message``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader
from toy import ToyData, ToyModel, quiet_trainer

from helpers.sharded import FSDPOnCPU, Model, whole
from nemologger import AutoResume, ModelCheckpoint, NeMoLogger, lightning_port, load_weights, sharded_state, tasks
from nemologger.callbacks import ExportModel
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.disk import LocalDisk
from nemologger.ranks import connect
from nemologger.resume import RestoreConfig
from nemologger.strategies import FSDP2Strategy, ModelParallelStrategy


class ShardsItself(Model):
    """In its configure_model."""

    def configure_model(self) -> None:
        if not isinstance(self, FSDPModule):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self, "training_step")


class Scalar(pl.LightningModule):
    """A parameter of no dimensions, on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def configure_model(self) -> None:
        if not isinstance(self.scale, DTensor):
            mesh = self.device_mesh["data_parallel"]
            self.scale = nn.Parameter(distribute_tensor(self.scale.data, mesh, [Replicate()]))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.scale.to_local() - 3).pow(2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Chain(Model):
    """What is called in a row, ModuleLists in lists and blocks included."""

    def __init__(self, parts: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = parts, head

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.head(_through(self.blocks, self.up(batch))).mean(-1)


class Nest(nn.Module):
    """A block with blocks inside, as experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return _through(self.experts, batch)


def _through(parts: nn.ModuleList, batch: torch.Tensor) -> torch.Tensor:
    for part in parts:
        batch = _through(part, batch) if isinstance(part, nn.ModuleList) else torch.tanh(part(batch))
    return batch


def chain(kind: str) -> Chain:
    first, head = nn.Linear(6, 6), nn.Linear(6, 6)
    parts: dict[str, list[nn.Module]] = {
        "tied": [first, nn.Linear(6, 6)],
        "repeated": [first, first, nn.Linear(6, 6)],
        "nested": [Nest(), Nest()],
        "lists": [nn.ModuleList([first]), nn.ModuleList([nn.Linear(6, 6)])],
    }
    if kind == "tied":
        head.weight = first.weight
    return Chain(nn.ModuleList(parts[kind]), head)


class Seen(pl.Callback):
    """The state at the beginning and at the end of training."""

    def on_train_start(self, trainer, pl_module):
        self.start = state_of(trainer)

    def on_train_end(self, trainer, pl_module):
        self.end = state_of(trainer)


def state_of(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    state = {name: whole(tensor) for name, tensor in sharded_state.model_state(trainer.strategy).items()}
    names = lightning_port.optimizer_names(trainer)
    with sharded_state.kept_in_place(trainer.strategy):
        states = [trainer.strategy.optimizer_state(optimizer)["state"] for optimizer in trainer.optimizers]
    for name_of, one in zip(names, states, strict=True):
        for number, fields in one.items():
            state |= {f"{name_of[number]}/{field}": whole(value) for field, value in fields.items()}
    return state


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    names = one.keys() | other.keys()
    return sorted(n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n]))


def trainer_of(
    strategy: Strategy,
    directory: Path | None,
    steps: int,
    *callbacks: pl.Callback,
    filename: str = "{step}",
    **options: Any,
) -> Any:
    ours = [] if directory is None else [
        ModelCheckpoint(monitor=None, dirpath=directory, filename=filename,
                        every_n_train_steps=2, save_top_k=-1, save_last=False, verbose=False, **options)
    ]  # fmt: skip
    return quiet_trainer(
        max_steps=steps, devices=2, strategy=strategy, limit_val_batches=0, callbacks=[*ours, *callbacks]
    )


def loader() -> DataLoader[torch.Tensor]:
    return DataLoader(ToyData(), batch_size=4)


def blocks(directory: Path, kind: str) -> dict[str, Any]:
    """Train, save, and load into the same kind of model."""
    before, after, model = Seen(), Seen(), chain(kind)
    trainer_of(FSDP2Strategy(), directory, 2, before).fit(model, loader())
    path = directory / "step=2"
    trainer_of(FSDP2Strategy(), None, 3, after, ModelCheckpoint(monitor=None, dirpath=directory / "again")).fit(
        chain(kind), loader(), ckpt_path=path
    )
    return {
        "differences": differences(before.end, after.start),
        "sharded": [name for name, part in model.named_modules() if isinstance(part, FSDPModule)],
        "tied": model.head.weight is model.get_submodule("blocks.0").weight if kind == "tied" else None,
    }


def trained(directory: Path) -> dict[str, torch.Tensor]:
    """Three checkpoints of one state: ours, Lightning's own directory, and Lightning's file."""
    seen = Seen()
    trainer = trainer_of(FSDP2Strategy(), directory, 2, seen)
    trainer.fit(Model(), loader())
    trainer.save_checkpoint(directory / "lightning")
    file = trainer_of(FSDP2Strategy(save_distributed_checkpoint=False), None, 2)
    file.fit(Model(), loader())
    file.save_checkpoint(directory / "file.ckpt")
    return seen.end


def restored(directory: Path, source: Path, make: Callable[[], Strategy], model: pl.LightningModule) -> dict[str, Any]:
    """What a new run begins with that takes its first weights and optimizer state from ``source``."""
    seen = Seen()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    trainer = trainer_of(make(), None, 1, seen)
    log = NeMoLogger(name="new", log_dir=directory, ckpt=ModelCheckpoint(monitor=None))
    tasks.train(
        model, loader(), trainer, log, AutoResume(restore_config=RestoreConfig(str(source), load_optim_state=True))
    )
    return seen.start


class Fails(Model):
    """In its fourth step."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise ZeroDivisionError("step 4")
        return super().training_step(batch, batch_idx)


def stopped(directory: Path) -> list[str]:
    trainer = trainer_of(FSDP2Strategy(ckpt_async_save=True), directory, 9, save_on_exception=True)
    with suppress(ZeroDivisionError):
        trainer.fit(Fails(), loader())
    torch.distributed.barrier()
    return sorted(path.name for path in directory.iterdir() if (path / "manifest.json").exists())


def context_of_rank_zero_fails(directory: Path) -> list[str]:
    """Two saves; what is said of the first, and that the second is complete."""

    def refuse(output: Path, disk: object) -> None:
        raise TypeError("not this context")

    ranks = connect(timedelta(seconds=30))
    saver = AsyncSaver(LocalDisk(), ranks)
    said = []
    try:
        for name, context in (("first", refuse), ("second", None)):
            snapshot = take({"state_dict": {"w": torch.full((3000,), float(len(said)))}})
            try:
                saver.start(snapshot, directory / name, Manifest(step=1, epoch=0), context)
                said.append(str(saver.finish() is not None))
            except Exception as error:  # noqa: BLE001  it is what is told
                said.append(f"{type(error).__name__}: {error}")
    finally:
        saver.close()
    module = nn.Module()
    module.register_buffer("w", torch.zeros(3000))
    load_weights(directory / "second", module)
    return [*said, str(module.w.unique().tolist())]


def scalar(directory: Path) -> list[str]:
    trainer_of(ModelParallelStrategy(2, 1), directory, 2).fit(Scalar(), loader())
    trainer = trainer_of(ModelParallelStrategy(2, 1), directory, 4)
    trainer.fit(Scalar(), loader(), ckpt_path=directory / "step=2")
    return sorted(type(value).__name__ for value in next(iter(trainer.optimizers[0].state.values())).values())


class Exported(Model):
    """Writes itself; the first checkpoint is the best one."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("score", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def save_to(self, save_path: str) -> None:
        state = {name: whole(tensor) for name, tensor in sharded_state.model_state(self.trainer.strategy).items()}
        if self.trainer.is_global_zero:
            torch.save(state, save_path)


class ExportedByItself(Exported, ShardsItself):
    """Sharded in its configure_model."""


def exported(directory: Path, strategy: Strategy, model: pl.LightningModule) -> dict[str, Any]:
    """What differs between the best checkpoint and the file, and between the last one and the model in memory."""
    ckpt = ModelCheckpoint(monitor="score", dirpath=directory, filename="{step}", every_n_train_steps=2, save_top_k=-1,
                           save_last=False, verbose=False)  # fmt: skip
    export, seen = ExportModel("m", ".model", best=True), Seen()
    callbacks = [export, seen, ckpt]
    trainer = quiet_trainer(max_steps=4, devices=2, strategy=strategy, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(model, loader())
    after = {name: whole(tensor) for name, tensor in sharded_state.model_state(strategy).items()}
    best, file = Model(), torch.load(directory / "m.model", weights_only=True)
    load_weights(directory / "step=2", best)
    wanted = {name: seen.end[name] for name in after}
    return {
        "file": differences(file, best.state_dict()),
        "memory": differences(after, wanted),
        "trained on": len(differences(file, wanted)),
    }


class Plain(Model):
    """Its step is as long as its gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def clipped() -> float:
    """How far tensor-parallel training, its gradients clipped, ends from that of a whole model."""
    seen, model = Seen(), Plain()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    strategy = FSDP2Strategy(tensor_parallel_size=2, tp_shard_plan=plan)
    options: dict[str, Any] = {"gradient_clip_val": 0.05, "use_distributed_sampler": False}
    trainer = quiet_trainer(max_steps=3, devices=2, strategy=strategy, limit_val_batches=0, callbacks=[seen], **options)
    trainer.fit(Plain(), loader())
    optimizer = model.configure_optimizers()
    for batch in islice(loader(), 3):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 0.05) <= 0.05:
            raise ValueError("there was nothing to clip")
        optimizer.step()
    return max(float((value - seen.end[name]).detach().abs().max()) for name, value in model.state_dict().items())


class Flat(FSDPOnCPU):
    """Its parameters have no names of their own."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    wanted: dict[str, torch.Tensor] = {}

    def restores(source: str, make: Callable[[], Strategy], model: Callable[[], pl.LightningModule]) -> list[str]:
        return differences(restored(directory / "new", directory / "trained" / source, make, model()), wanted)

    own = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    scenarios: dict[str, Callable[[], Any]] = {
        "trained": lambda: wanted.update(trained(directory / "trained")),
        "restore ours, FSDP2": lambda: restores("step=2", FSDP2Strategy, Model),
        "restore ours, own configure_model": lambda: restores("step=2", own, ShardsItself),
        "restore ours, FSDP": lambda: restores("step=2", FSDPOnCPU, Model),
        "restore a file, FSDP2": lambda: restores("file.ckpt", FSDP2Strategy, Model),
        "restore a file, own configure_model": lambda: restores("file.ckpt", own, ShardsItself),
        **{kind: partial(blocks, directory / kind, kind) for kind in ("tied", "repeated", "nested", "lists")},
        "toy": lambda: trainer_of(FSDP2Strategy(), directory / "toy", 2, filename="{model_name}").fit(
            ToyModel(width=7), loader()
        ),
        "stopped": lambda: stopped(directory / "stopped"),
        "context": lambda: context_of_rank_zero_fails(directory / "context"),
        "clipped": clipped,
        **{
            f"export {type(strategy).__name__}": partial(exported, directory / f"export-{i}", strategy, model)
            for i, (strategy, model) in enumerate(
                [(FSDP2Strategy(), Exported()), (FSDPOnCPU(), Exported()), (own(), ExportedByItself())]
            )
        },
        "scalar": lambda: scalar(directory / "scalar"),
        "flat": lambda: trainer_of(Flat(), directory / "flat", 2).fit(Model(), loader()),
    }
    for name, run in scenarios.items():
        try:
            seen[name] = run()
        except Exception as error:  # noqa: BLE001  the test looks at it
            seen[name] = f"{type(error).__name__}: {error}"
    seen["trained"] = seen["trained"] or len(wanted)
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
