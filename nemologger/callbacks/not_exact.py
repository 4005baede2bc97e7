"""What of a model, its device and its callbacks does not repeat after a resume, to be said before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelPruning

from nemologger import lightning_port

if TYPE_CHECKING:
    import lightning.pytorch as pl

OTHER_DATA = (
    "the training data is not what it was when the checkpoint was saved (%s): the run cannot go on "
    "exactly, and leaves out as many batches of the epoch as were trained on. What is drawn when data are made "
    "needs a fixed seed: a random_split a generator, the rest of a setup() a call of lightning.seed_everything"
)
OTHER_RANKS = (
    "the checkpoint is of %d ranks, of which %d read data; there are %d now, of which %d do: training goes on "
    "after as many samples, with new random numbers, and means of this epoch are of what follows"
)
RAISED = (
    "was under way when the checkpoint was saved: a run that goes on trains on its batch once more, with other random "
    "numbers if it had drawn some, and with what it had already counted or set in the program; or on the next batch, if it "
    "came of a loader or dataset with a state of its own"
)


_CHECKSUMS = {
    "chosen": "other samples are chosen (Subset, random_split)",
    "content": "the dataset holds other values in memory",
}


def differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """What has changed of the data of training loaders, as :attr:`nemologger.exact.loaders.feed.Feed.data` has it."""
    if len(before) != len(now):
        return f"training loaders: {len(before)} -> {len(now)}"
    found = []
    for number, (then, today) in enumerate(zip(before, now, strict=True)):
        where = f"loader {number}, " if len(now) > 1 else ""
        for key in today.keys() | then.keys():
            if then.get(key) != today.get(key):
                found.append(where + _CHECKSUMS.get(key, f"{key}: {then.get(key)} -> {today.get(key)}"))
    return "; ".join(sorted(found))


def advice_for(device: torch.device) -> str:
    """What else it takes for a run on ``device`` to repeat."""
    if device.type != "cuda" or (torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark):
        return ""
    return (
        "loaders and random numbers go on where they were, but some kernels of a GPU, and NCCL on some machines, differ in "
        "the last bits from run to run; Trainer(deterministic=True, benchmark=False) keeps torch from using them"
    )


def advice_for_validation(loaders: Iterable[Any]) -> str:
    """What else differs: the generators of workers that stay are seeded once in each life of a run."""
    stay = [str(i) for i, loader in enumerate(loaders) if getattr(loader, "persistent_workers", False)]
    if not stay:
        return ""
    return (
        f"the workers of validation loader {', '.join(stay)} stay from one validation to the next: if they draw random "
        "numbers, a resumed run draws others for validation (not for training); persistent_workers=False draws the same"
    )


def limits_of(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[str]:
    """A sentence for each thing that a resumed run of ``trainer`` will not repeat."""
    if layers := _with_dropout_of_cudnn(trainer.strategy.root_device, module):
        yield (
            f"the dropout of {', '.join(layers)} draws from a state of cuDNN that cannot be saved: a resumed run draws "
            "another one; torch.backends.cudnn.enabled = False takes torch's"
        )
    if any(isinstance(callback, ModelPruning) for callback in lightning_port.callbacks(trainer)):
        yield (
            "ModelPruning keeps its masks out of checkpoints: a resumed run begins with the pruned weights, but trains all "
            "of them until it prunes again, so its losses differ from those of a run that was never stopped"
        )


def _with_dropout_of_cudnn(device: torch.device, module: torch.nn.Module) -> list[str]:
    """The names of recurrent layers whose dropout is cuDNN's."""
    if device.type != "cuda" or not torch.backends.cudnn.enabled:
        return []
    named = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.nn.RNNBase)]
    return [name for name, part in named if part.dropout > 0 and part.num_layers > 1]
