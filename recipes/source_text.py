"""The Python standard library's own source files, as text to learn from: on every machine, nothing to download."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}


class Windows(Dataset[Tensor]):
    """A text cut into windows of ``length + 1`` bytes: each position's next byte is in the window too.

    Args:
        text: Bytes of all files, one after the other.
        length: Bytes that are predicted per window.
    """

    def __init__(self, text: bytes, length: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        """Number of windows."""
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> Tensor:
        """Window number ``index``: ``(length + 1,)``, int64."""
        start = index * self.length
        return self.text[start : start + self.length + 1].long()


class SourceText(pl.LightningDataModule):
    """Windows of the standard library's source, split by file: every tenth file is for validation.

    Args:
        length: Bytes that are predicted per window.
        batch_size: Windows per batch.
        validation_batches: How many batches validation looks at.
    """

    def __init__(self, length: int = 128, batch_size: int = 16, validation_batches: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.length = length
        self.batch_size = batch_size
        self.validation_batches = validation_batches

    def setup(self, stage: str) -> None:
        """Read the files."""
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))
        train = b"".join(path.read_bytes() for i, path in enumerate(files) if i % 10)
        validation = b"".join(path.read_bytes() for i, path in enumerate(files) if not i % 10)
        self.train = Windows(train, self.length)
        self.validation = Windows(
            validation[: self.validation_batches * self.batch_size * self.length + 1], self.length
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Windows in random order."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The same windows each time."""
        return DataLoader(self.validation, batch_size=self.batch_size)
