"""The classes that NeMo's context fixtures were written with, and more kinds of arguments to capture."""

from __future__ import annotations

import enum
from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch

from nemologger.io import DirArtifact, FileArtifact, IOMixin, TrainerContext
from nemologger.ranks import leave_at_exit


@dataclass
class SubCfg:
    heads: int = 4
    act: Any = torch.nn.functional.gelu
    tags: list[str] = field(default_factory=lambda: ["a", "b"])


@dataclass
class Cfg(IOMixin):
    dim: int = 8
    depth: int = 2
    dtype: torch.dtype = torch.float32
    sub: SubCfg = field(default_factory=SubCfg)
    init_fn: Any = torch.nn.init.ones_


class Tok(IOMixin):
    __io_artifacts__ = (FileArtifact("vocab_file"), FileArtifact("merges", required=False))

    def __init__(self, vocab_file, merges=None, lower=True):
        self.vocab_file, self.merges, self.lower = vocab_file, merges, lower


class DirTok(IOMixin):
    __io_artifacts__ = (DirArtifact("folder"),)

    def __init__(self, folder):
        self.folder = folder


class Model(pl.LightningModule, IOMixin):
    def __init__(
        self,
        config: Cfg,
        tokenizer: Tok | None = None,
        optim: Any = None,
        loss_fn: Any = torch.nn.functional.mse_loss,
        parts: Any = None,
        betas: Any = (0.9, 0.95),
        name: str = "m",
    ):
        super().__init__()
        self.config, self.tokenizer, self.optim, self.loss_fn = config, tokenizer, optim, loss_fn
        self.parts, self.betas, self.name = parts, betas, name


class SubModel(Model):
    def __init__(self, width: int, config: Cfg | None = None, **kwargs: Any):
        super().__init__(config or Cfg(dim=width), name="sub", **kwargs)
        self.width = width


class Part(IOMixin):
    def __init__(self, fn, n=1):
        self.fn, self.n = fn, n


class Anything(IOMixin):
    """Takes whatever it is given."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs


class Plain:
    """Not captured by anything."""

    def __init__(self, x=0):
        self.x = x


class Base:
    """Another library's class, for track_io."""

    def __init__(self, x, y=2):
        self.x, self.y = x, y


class Data(pl.LightningDataModule, IOMixin):
    def __init__(self, path="data.bin", seq_length=128, global_batch_size=4):
        super().__init__()
        self.path, self.seq_length, self.global_batch_size = path, seq_length, global_batch_size


class HparamsModel(pl.LightningModule):
    def __init__(self, width, net=None, lr=0.1):
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net


class NeedsNet(pl.LightningModule):
    def __init__(self, net, lr=0.1):
        super().__init__()
        self.save_hyperparameters(ignore="net")


class Forgetful(pl.LightningModule):
    """Neither captured nor with hyperparameters."""

    def __init__(self, width):
        super().__init__()


class Color(enum.Enum):
    RED = 1
    BLUE = "b"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


Point = namedtuple("Point", ["x", "y"])


@dataclass
class Scaled(IOMixin):
    """Changes its own field, which must not be mistaken for the user's doing."""

    lr: float = 0.1
    tag: str = "t"

    def __post_init__(self):
        self.lr = self.lr * 2


def scaled(x, k=2):
    return x * k


class SpawnedModel(Model):
    """Trains in other processes, which find it by its name."""

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SpawnedData(Data):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 1), batch_size=2)


class DumpsOnce(pl.Callback):
    def __init__(self, directory):
        self.directory = directory

    def on_train_end(self, trainer, module):
        leave_at_exit()
        if trainer.is_global_zero:
            TrainerContext.from_trainer(trainer).io_dump(self.directory)
