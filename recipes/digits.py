"""Classify scikit-learn's handwritten digits: the objects used by hand, without fiddle.

python recipes/digits.py
python recipes/digits.py --max-epochs 20   # go on from the last checkpoint
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import nemologger as nl


class DigitClassifier(pl.LightningModule):
    """Two layers over 8 x 8 pixels.

    Args:
        width: Size of the hidden layer.
        learning_rate: Adam's.
    """

    def __init__(self, width: int = 64, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self.net(pixels), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Share of digits that are recognised."""
        pixels, labels = batch
        self.log("val_acc", (self.net(pixels).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def digits() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """1,500 digits to learn from and 297 to test on, the same split each time."""
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))
    train, validation = random_split(dataset, [1500, 297], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=297)


def main() -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=None, help="where experiments go (default: ./nemo_experiments)")
    parser.add_argument("--max-epochs", type=int, default=10, help="epochs in all (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    model = DigitClassifier()
    trainer = nl.Trainer(accelerator="cpu", max_epochs=arguments.max_epochs, log_every_n_steps=10)
    log = nl.NeMoLogger(
        name="digits",
        log_dir=arguments.dir,
        ckpt=nl.ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=2, save_last="link"),
        tensorboard=TensorBoardLogger(save_dir="tb_logs", name="digits"),
    )
    resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)

    run = log.setup(trainer, resume_if_exists=True)
    resume.setup(trainer, model)
    trainer.fit(model, *digits())

    print(f"\nrun directory    {run.log_dir}")
    print(f"best checkpoint  {trainer.checkpoint_callback.best_model_path}")
    print(f"best accuracy    {trainer.checkpoint_callback.best_model_score:.1%}")
    print(f"last checkpoint  {trainer.checkpoint_callback.last_model_path}")


if __name__ == "__main__":
    main()
