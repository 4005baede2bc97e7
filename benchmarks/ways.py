"""Ways to save the state of a trainer and to load it again: ours, Lightning's, torch's, and other libraries'."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from nemologger import ModelCheckpoint
from nemologger.checkpoint.reading.load import is_of_model, open_verified

Load = Callable[[Path, torch.nn.Module, torch.optim.Optimizer], object]


@dataclass
class Way:
    """A way to save.

    Attributes:
        save: ``save(trainer, directory)`` blocks training.
        load: ``load(directory, model, optimizer)``, both fresh, from where ``save`` has written.
        wait: Return when all is durable.
        before_step: Called before the optimizer changes the state.
        held: Bytes that it holds between saves, beside what is seen to grow during one.
        clear: Remove what is not in the directory that it was given. Nobody's removal is part of a figure.
    """

    save: Callable[[pl.Trainer, Path], object]
    load: Load
    wait: Callable[[], object] = lambda: None
    before_step: Callable[[], object] = lambda: None
    held: Callable[[], int] = lambda: 0
    clear: Callable[[], object] = lambda: None
    stall: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    loading: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def fsync(path: Path) -> None:
    """Make what others have written durable, as ours is."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def state_of(trainer: pl.Trainer) -> dict[str, Any]:
    """The whole checkpoint, as Lightning and torch save it."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def into(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A checkpoint of Lightning's form into model and optimizer."""
    model.load_state_dict(state["state_dict"])
    optimizer.load_state_dict(state["optimizer_states"][0])


def template(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What those load into who need to be given the memory: the state of a fresh Adam is empty."""
    parameters = list(model.parameters())
    moments = {
        i: {"step": torch.zeros(()), "exp_avg": torch.empty_like(p), "exp_avg_sq": torch.empty_like(p)}
        for i, p in enumerate(parameters)
    }
    return {
        "state_dict": model.state_dict(),
        "optimizer_states": [{"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}],
    }


class Ours:
    """Our callback, asked to save at certain steps."""

    def __init__(self, directory: Path, number: int, *, beside: bool, staging: str = "auto") -> None:
        self.directory = directory / f"ours-{number}"
        self.callback = ModelCheckpoint(
            dirpath=self.directory, monitor=None, save_top_k=-1, save_last=False,
            every_n_train_steps=10**9 + number, async_save=beside, verbose=False, exact_resume=False,
            staging=staging if beside else "auto",
        )  # fmt: skip
        self.trainer: pl.Trainer | None = None
        self.saves = 0

    def way(self) -> Way:
        return Way(self.save, self.load, self.wait, held=self.held, clear=self.clear)

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        self.trainer, self.saves = trainer, self.saves + 1
        self.callback.filename = f"{{step}}-{self.saves}"
        self.callback._last_global_step_saved = 0  # let it save the same step once more
        self.callback._save(trainer)

    def wait(self) -> None:
        self.callback._finish(self.trainer, final=False)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # As a resume does: everything is verified, and nothing is in memory twice.
        opened = open_verified(self.path, keep=lambda key: not is_of_model(key))
        into(model, optimizer, opened.read(into=model))

    def held(self) -> int:
        beside = self.callback._keeper._beside
        return 0 if beside is None or beside._equipment.layout is None else beside._equipment.layout.arena.size

    @property
    def path(self) -> Path:
        return Path(self.callback.shelf.kept[-1].path)

    def clear(self) -> None:
        for checkpoint in self.directory.glob("step=*"):
            shutil.rmtree(checkpoint)


class _Lightning:
    def __init__(self) -> None:
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())
        self.path = Path()

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path / "x.ckpt")
        fsync(path / "x.ckpt")

    def save_beside(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "x.ckpt"
        self.plugin.save_checkpoint(_copied(state_of(trainer)), self.path)

    def wait(self) -> None:
        self.plugin._executor.shutdown(wait=True)
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())
        fsync(self.path)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        into(model, optimizer, torch.load(path / "x.ckpt", map_location="cpu", weights_only=False))


def _copied(state: Any) -> Any:
    """Lightning's asynchronous plugin writes live tensors; a copy makes it correct."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


class _Dcp:
    def __init__(self, *, overlapped: bool = False) -> None:
        self.path = Path()
        self.written: Future[Any] | None = None
        self.staged: Future[Any] | None = None
        options = StagingOptions(use_pinned_memory=False, use_non_blocking_copy=False)
        self.stager = DefaultStager(options) if overlapped else None

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        dcp.save(state_of(trainer), checkpoint_id=str(path / "dcp"))
        fsync(path / "dcp")

    def save_beside(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "dcp"
        response: Any = dcp.async_save(state_of(trainer), checkpoint_id=str(self.path), async_stager=self.stager)
        self.staged = None
        if isinstance(response, AsyncSaveResponse):
            self.staged, response = response.staging_completion, response.upload_completion
        self.written = response

    def before_step(self) -> None:
        if self.staged is not None:
            self.staged.result()
            self.staged = None

    def wait(self) -> None:
        assert self.written is not None  # noqa: S101
        self.written.result()
        fsync(self.path)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        state = template(model, optimizer)
        dcp.load(state, checkpoint_id=str(path / "dcp"))
        into(model, optimizer, state)


class _TorchCheckpointing:
    def __init__(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_async_save()
        # Its own direct I/O ends in "Invalid argument" for this state: it writes lengths that are not whole sectors.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(config)
        self.written: Future[Any] | None = None
        self.path = Path()

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "tc"
        state = state_of(trainer)
        payload = {"state_dict": dict(state["state_dict"]), "optimizer_states": state["optimizer_states"]}
        self.written = self.manager.save(str(self.path), payload)

    def before_step(self) -> None:
        with self.manager.lock():
            pass

    def wait(self) -> None:
        assert self.written is not None  # noqa: S101
        self.written.result()
        fsync(self.path)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        into(model, optimizer, dict(self.manager.load(str(path / "tc"), into=template(model, optimizer))))


class _Torchsnapshot:
    def __init__(self) -> None:
        import torchsnapshot

        self.library = torchsnapshot
        self.pending: Any = None
        self.path = Path()

    def save(self, trainer: pl.Trainer, path: Path) -> None:
        self.path = path / "snapshot"
        app = {"model": trainer.lightning_module, "optimizer": trainer.optimizers[0]}
        self.pending = self.library.Snapshot.async_take(str(self.path), app)

    def wait(self) -> None:
        self.pending.wait()
        fsync(self.path)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(template(model, optimizer)["optimizer_states"][0])
        self.library.Snapshot(str(path / "snapshot")).restore({"model": model, "optimizer": optimizer})


class _Safetensors:
    def save(self, trainer: pl.Trainer, path: Path) -> None:
        from safetensors.torch import save_file

        state = state_of(trainer)
        moments = state["optimizer_states"][0]["state"].items()
        tensors = {f"state_dict.{key}": value for key, value in state["state_dict"].items()}
        tensors |= {f"optimizer.{i}.{key}": value for i, values in moments for key, value in values.items()}
        save_file(tensors, path / "x.safetensors")
        fsync(path / "x.safetensors")

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from safetensors.torch import load_file

        tensors = load_file(path / "x.safetensors")
        state: dict[str, Any] = {"state_dict": {}, "optimizer_states": [{**optimizer.state_dict(), "state": {}}]}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "state_dict":
                state["state_dict"][rest] = tensor
            else:
                number, key = rest.split(".")
                state["optimizer_states"][0]["state"].setdefault(int(number), {})[key] = tensor
        into(model, optimizer, state)
        for tensor in tensors.values():  # it has mapped the file, and read of it what it has copied to the model
            tensor.view(-1)[:: mmap.PAGESIZE // tensor.element_size()].sum()


def peers(only: str = "") -> tuple[dict[str, Way], list[str]]:
    """Everybody else's ways that have ``only`` in their names, and why some of them are not there."""
    lightning, dcp_sync, dcp_async, overlapped = _Lightning(), _Dcp(), _Dcp(), _Dcp(overlapped=True)
    ways = {
        "Lightning, sync": Way(lightning.save, lightning.load),
        "Lightning, AsyncCheckpointIO": Way(lightning.save_beside, lightning.load, lightning.wait),
        "dcp.save": Way(dcp_sync.save, dcp_sync.load),
        "dcp.async_save": Way(dcp_async.save_beside, dcp_async.load, dcp_async.wait),
        "dcp.async_save, overlapped": Way(
            overlapped.save_beside, overlapped.load, overlapped.wait, overlapped.before_step
        ),
    }
    missing: list[str] = []

    def add(name: str, make: Callable[[], Any]) -> None:
        if only not in name:  # some start a process, which nobody would end
            return
        try:
            peer = make()
        except ImportError as error:
            missing.append(f"{name}: {error}")
            return
        nothing = Way.wait
        ways[name] = Way(peer.save, peer.load, getattr(peer, "wait", nothing), getattr(peer, "before_step", nothing))

    add("torch_checkpointing", _TorchCheckpointing)
    add("torchsnapshot, async_take", _Torchsnapshot)
    add("safetensors + fsync", _Safetensors)
    return {name: way for name, way in ways.items() if only in name}, missing


def close(ways: dict[str, Way]) -> None:
    """End the processes of those who have some."""
    for way in ways.values():
        manager = getattr(getattr(way.save, "__self__", None), "manager", None)
        if manager is not None:
            manager.close()
