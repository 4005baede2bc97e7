"""Train a toy in this process, with a signal at a chosen moment; what it saw can be compared with a run in one piece."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from toy import quiet_trainer
from train_toy import Forgetful, Shuffled

import nemologger as nl

STEPS = 20  # of ten batches an epoch


class Watch(Callback):
    """Writes losses and validations down, and sends a signal at one moment of one step."""

    def __init__(self, hook: str | None = None, at: int = 0, sig: int = signal.SIGTERM, times: int = 1) -> None:
        self.hook, self.at, self.sig, self.times = hook, at, sig, times
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []

    def _moment(self, hook: str, number: int) -> None:
        if hook == self.hook and number == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.sig)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._moment("batch", trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._moment("sanity check" if trainer.sanity_checking else "validation", trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


@dataclass
class Run:
    """The lives of one run."""

    directory: Path
    trainer: dict[str, Any] = field(default_factory=dict)
    ckpt: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "toy" / "checkpoints"

    def train(self, *callbacks: Callback, watch: Watch | None = None) -> Any:
        """Train until the end, or until something stops it; returns the trainer, or the exit code."""
        watch = watch or Watch()
        trainer = quiet_trainer(
            # Those in front of the others find their places themselves.
            **{"max_steps": STEPS, "callbacks": [*callbacks, *self.callbacks(), watch], **self.trainer}
        )
        ckpt = nl.ModelCheckpoint(
            **{
                "filename": "{step}", "every_n_train_steps": 1000, "save_top_k": 2, "always_save_context": False,
                "save_context_on_train_end": False, **self.ckpt,
            }
        )  # fmt: skip
        log = nl.NeMoLogger(name="toy", log_dir=self.directory, ckpt=ckpt)
        resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
        try:
            nl.train(Forgetful(), Shuffled(), trainer, log, resume)
        except SystemExit as stopped:
            return stopped.code
        finally:
            self.losses += watch.losses
            self.validations += watch.validations
        return trainer

    def in_one_piece(self) -> Run:
        """The same run in another directory, that nobody stops."""
        straight = Run(self.directory / "straight", self.trainer, self.ckpt, self.callbacks)
        straight.train()
        return straight

    def goes_on(self, *callbacks: Callback) -> None:
        """Train to the end, and compare all that was seen with a run in one piece."""
        taken, straight = len(self.losses), self.in_one_piece()
        assert 0 < taken < len(straight.losses)
        trainer = self.train(*callbacks)
        assert trainer.state.finished
        assert len(set(straight.losses)) > len(straight.losses) // 2
        assert self.losses == straight.losses
        assert self.validations == straight.validations
