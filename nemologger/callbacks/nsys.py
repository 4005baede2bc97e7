"""A range of steps for Nsight Systems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nemologger.callbacks.profile_window import ProfileWindow
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class NsysCallback(ProfileWindow):
    """Has Nsight Systems record a range of optimizer steps. Needs CUDA.

    Start the program under the profiler, which waits for the range::

        nsys profile -s none -t nvtx,cuda -o trace --force-overwrite true --capture-range=cudaProfilerApi \\
            --capture-range-end=stop python train.py

    Without ``nsys`` it does nothing but mark the range.

    Args:
        start_step: Begin when so many optimizer steps have been made, counted over the whole run.
        end_step: End when so many have been made. The same number as ``start_step`` means one step.
        ranks: The global ranks that are recorded; empty for all.
        gen_shape: Also mark every operator with the shapes of its inputs.

    Raises:
        ConfigurationError: If the numbers cannot work; at setup, if the trainer does not run on CUDA.

    Example:
        >>> NsysCallback(start_step=10, end_step=12).ranks
        [0]
    """

    def __init__(self, start_step: int, end_step: int, ranks: Sequence[int] = (0,), gen_shape: bool = False) -> None:
        super().__init__(start_step, end_step, ranks)
        self.gen_shape = gen_shape
        self._marks: torch.autograd.profiler.emit_nvtx | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is something to record.

        Raises:
            ConfigurationError: If the trainer does not run on CUDA, or a rank is not there.
        """
        super().setup(trainer, pl_module, stage)
        device = trainer.strategy.root_device
        if stage == "fit" and device.type != "cuda":
            raise ConfigurationError(
                f"NsysCallback needs CUDA, this trainer runs on {device.type}: leave it out, or use MemoryProfileCallback, "
                "which writes a torch.profiler trace anywhere"
            )

    def begin(self, trainer: pl.Trainer) -> None:
        """Open the range."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        self._marks = torch.autograd.profiler.emit_nvtx(record_shapes=self.gen_shape)  # type: ignore[no-untyped-call]
        self._marks.__enter__()  # type: ignore[no-untyped-call]

    def end(self, trainer: pl.Trainer) -> None:
        """Close it."""
        marks, self._marks = self._marks, None
        if marks is not None:
            marks.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]
