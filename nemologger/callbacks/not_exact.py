"""What does not repeat after a resume, and how that is said: before training, and at the save after it shows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelPruning

from nemologger import lightning_port

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger("nemologger.callbacks.exact_resume")

# --- of the fit -------------------------------------------------------------------------------------------------------

_OTHER_RANKS = (
    "the checkpoint was saved by %s, this run has %s: training goes on after as many samples, with new random numbers"
)

RAISED = (
    "was under way when the checkpoint was saved: a run that goes on trains on its batch once more, with other random "
    "numbers if it had drawn some, and with what it had already counted or set in the program; or on the next batch, if it "
    "came of a loader or dataset with a state of its own"
)

VALIDATED_FOR_STOP = (
    "was changed by the validation that there was because training stopped: its hooks have set parameters, or numbers of an "
    "optimizer. A resumed run goes on with these; one that is never stopped is not validated there"
)

OTHER_BUFFER = "differs from rank 0's, and {}: a resumed run begins with rank 0's on this rank, too"

# --- of what the program changes beside weights -----------------------------------------------------------------------

NOT_SAVED = (
    "has changed since training began, and is not saved: it {}. A resumed run begins with it as the program makes it. If it "
    "decides about training, register it as a buffer, or save it in on_save_checkpoint()"
)

RECORD = (
    "is a {} that has changed since training began, and is not saved: one that is only added to most often is a record, and "
    "one that holds objects, or too much, cannot be. If it decides about training, register it as a buffer, or save it in "
    "on_save_checkpoint()"
)

STRANGER = (
    "is an object of {}, has changed since training began ({}), and is not saved. If that decides about training, save it "
    "in on_save_checkpoint(), or give it state_dict() and load_state_dict()"
)

OF_CALLBACK = (
    "keeps {} of its own, which changed since training began, and are not saved: Lightning saves what a callback's "
    "state_dict() returns. If they decide about training, give it state_dict() and load_state_dict()"
)

CALLBACK_ACTS = (
    "keeps {} of its own, which changed since training began, are not saved, and by which it changes the module, an "
    "optimizer or the like: a resumed run begins with them as the program makes them. Give it state_dict() and "
    "load_state_dict()"
)

SET_ANEW = (
    "was brought back, and then changed by a hook that starts training. If it is made of itself there (x *= 0.5), that is "
    "done once more in each life; if it is set, it is as the program says today"
)

BEHIND_LOADERS = (
    "is brought back when training starts, behind train_dataloader(): if that depends on it, where loaders are made again "
    "for each stage (reload_dataloaders_every_n_epochs), the epoch that a run goes on with has other data. Give the data "
    "module state_dict() and load_state_dict(), which Lightning uses in time"
)

OWN_STATE_LOST = (
    "has a state_dict() and has changed since training began, and is not saved: it {}. A resumed run begins with it as the "
    "program makes it. Return it from configure_optimizers() if it belongs there, save it in on_save_checkpoint(), or make "
    "it a torch.nn.Module that the module holds"
)

APART_LOST = (
    "is a network that is in no checkpoint where it is, was made or has changed since training began, and is not saved: "
    "it {}. A resumed run begins with it as the program makes it. Make it an attribute of the module itself, with "
    "requires_grad_(False) if it is not trained (self.teacher = teacher), or save it in on_save_checkpoint()"
)

INNER_LOST = (
    "is an optimizer within another one, of which the other one's state_dict() has nothing, and is not saved: it {}. A "
    "resumed run begins with it as the program makes it. Give the other one state_dict() and load_state_dict() of its own"
)

SWAPPED = (
    "is {} now, and was {} when training began: that is not saved. A resumed run begins with it as the program makes it. "
    "Set it in on_train_start(), too, where it depends on the epoch, or save which it is in on_save_checkpoint()"
)

HOOKS = (
    "of the program are {} now, and were {} when the checkpoint was saved, which has no functions: the run goes on with "
    "those that the program registers. Do so in on_train_start(), too, where it depends on the epoch or step"
)

OWN_STATE_NOT_BACK = "was saved, and begins as the program makes it: {}"

GRADIENTS = (
    "of parameters are zeroed by the program itself, and not saved: what they hold {}. Sums of several batches that no step "
    "has taken when a checkpoint is saved are lost with a resume; where they are zeroed before backward(), nothing is"
)

TOO_MUCH_LOGGED = "is too large to be saved: after a resume it counts from there"


class Notices:
    """What is said in one fit, each thing once: some of it shows only while training goes on."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def say(self, what: str, limit: str, level: int = logging.WARNING) -> None:
        """Say of ``what`` what cannot be promised."""
        if (what, limit) not in self._said:
            self._said.add((what, limit))
            log.log(level, "exact resume, %s %s", what, limit)


# --- before training --------------------------------------------------------------------------------------------------


def say_before_training(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """What is known of the model, its device and the callbacks, and what would help."""
    stay = advice_for_validation(lightning_port.validation_loaders(trainer))
    for advice in filter(None, (advice_for(trainer.strategy.root_device), stay)):
        log.info("exact resume: %s", advice)
    for limit in limits_of(trainer, module):
        log.warning("exact resume: %s", limit)


def say_other_ranks(ranks_then: int, readers_then: int, ranks: int, readers: int, batches: int) -> None:
    """That there are more or fewer ranks, after so many ``batches`` of the epoch that each of those then had trained on."""
    said = _OTHER_RANKS % (_ranks(ranks_then, readers_then), _ranks(ranks, readers))
    if batches:
        said += "; means over this epoch are of its rest alone"
    if twice := batches * readers_then % readers:
        said += f"; {twice} of its batches, which {readers} ranks cannot share evenly, are trained on once more"
    log.warning("exact resume: %s", said)


def _ranks(ranks: int, readers: int) -> str:
    """How many there are, and, where the others get the same data, how many read different data."""
    return f"{ranks} rank{'s' if ranks > 1 else ''}{'' if readers == ranks else f' ({readers} with data of their own)'}"


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
