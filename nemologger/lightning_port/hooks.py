"""The trainer's callbacks, and when they and the module have their turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    import lightning.pytorch as pl


_EPOCH_END = "on_train_epoch_end"
_EPOCH_START = "on_train_epoch_start"
_START = "on_train_start"
_AnyCallback = TypeVar("_AnyCallback", bound=Callback)
#: Called in every step.
_OF_STEP = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end",
)  # fmt: skip


def callbacks(trainer: pl.Trainer) -> list[Callback]:
    """The trainer's list of callbacks itself."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector


def set_callbacks(trainer: pl.Trainer, those: Iterable[Callback]) -> None:
    """Let ``those`` be the trainer's callbacks. For a ``setup``: the list that Lightning is going through stays as it is."""
    trainer.callbacks = [*those]  # type: ignore[attr-defined]


def callback_saves_itself(callback: Callback) -> bool:
    """Whether ``callback`` has state of its own for checkpoints."""
    return any(is_overridden(hook, callback) for hook in ("state_dict", "on_save_checkpoint"))


def callbacks_of_the_program(trainer: pl.Trainer) -> dict[str, object]:
    """The callbacks that are neither Lightning's nor ours, by name."""
    ours = ("lightning.", "nemologger.")
    return {
        f"callback {i} {type(callback).__name__}": callback
        for i, callback in enumerate(c for c in callbacks(trainer) if not type(c).__module__.startswith(ours))
    }


def without_empty_hooks(callback: _AnyCallback) -> _AnyCallback:
    """``callback``, of which Lightning does not call the hooks of a step that it leaves empty.

    Each call takes it 4 microseconds. It leaves out what cannot be called.
    """
    for hook in _OF_STEP:
        if not is_overridden(hook, callback):
            setattr(callback, hook, None)
    return callback


def move_to_end(trainer: pl.Trainer, callback: Callback) -> None:
    """Let ``callback`` act after all others, checkpoints included. For its ``setup``."""
    others = [other for other in callbacks(trainer) if other is not callback]
    set_callbacks(trainer, [*others, callback])


def behind_module(trainer: pl.Trainer, hook: str, call: Callable[[], None]) -> None:
    """For a callback's ``hook``, one of :func:`_next_after_module`: ``call()`` behind that of the module.

    Lightning calls the module's own after those of all callbacks. Several calls are made in the order in which they came
    in; where the module has no such hook of its own, at once. But those that begin or end training or an epoch are always
    waited for: behind them everybody has done so (callbacks, schedules, loggers), and made what training needs.
    """
    if hook not in (_EPOCH_START, _EPOCH_END, _START) and not is_overridden(hook, trainer.lightning_module):
        call()
        return
    owner, name = _next_after_module(trainer)[hook]
    behind = vars(owner).get(name)
    if not isinstance(behind, _Behind):
        behind = _Behind(owner, name)
    behind.calls.append(call)


def forget_behind_module(trainer: pl.Trainer) -> None:
    """After an exception: make no calls that :func:`behind_module` has put off."""
    for owner, name in _next_after_module(trainer).values():
        behind = vars(owner).get(name)
        if isinstance(behind, _Behind):
            behind.undo()


class _Behind:
    """What is put in the place of a method that Lightning calls next, once; see :func:`behind_module`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.calls: list[Callable[[], None]] = []
        self.is_calling = False
        self._owner, self._name, self._own, self._plain = vars(owner), name, vars(owner).get(name), getattr(owner, name)
        self._owner[name] = self

    def undo(self) -> None:
        del self._owner[self._name]
        if self._own is not None:
            self._owner[self._name] = self._own

    def __call__(self) -> None:
        self.is_calling = True
        try:
            for call in self.calls:
                call()
        finally:
            self.undo()
        self._plain()


def is_behind_epoch(trainer: pl.Trainer) -> bool:
    """Whether this is a call that :func:`behind_module` has put off to the end of the epoch."""
    owner, name = _next_after_module(trainer)[_EPOCH_END]
    behind = vars(owner).get(name)
    return isinstance(behind, _Behind) and behind.is_calling


def go_on_accumulating(trainer: pl.Trainer, batches: int) -> None:
    """For ``on_train_start``: accumulate so many batches, once callbacks have checked the Trainer's own number."""
    behind_module(trainer, _START, lambda: setattr(trainer, "accumulate_grad_batches", batches))


def go_on_clipping(trainer: pl.Trainer, value: float | None) -> None:
    """For ``on_train_start``: clip gradients to ``value``, as a callback had set it."""
    behind_module(trainer, _START, lambda: setattr(trainer, "gradient_clip_val", value))


def _next_after_module(trainer: pl.Trainer) -> dict[str, tuple[Any, str]]:
    """What Lightning calls once both the callbacks and the module have had their turn."""
    return {
        _EPOCH_END: (trainer.fit_loop.epoch_progress, "increment_completed"),
        _START: (trainer.strategy, "on_train_start"),
        _EPOCH_START: (trainer.fit_loop.epoch_progress, "increment_started"),
        "on_train_batch_end": (trainer._logger_connector, "on_batch_end"),
        "on_validation_end": (trainer.strategy, "on_validation_end"),
    }


def hooks_between_steps(module: pl.LightningModule) -> list[str]:
    """The hooks of ``module`` that run after a checkpoint callback and before the optimizer's next step."""
    return [hook for hook in (*_OF_STEP, _EPOCH_END, _EPOCH_START) if is_overridden(hook, module)]


def at_end_of_backward(loss: torch.Tensor, call: Callable[[], None]) -> None:
    """For ``on_before_backward``: have ``call()`` made when this rank has computed all gradients of ``loss`` itself.

    That is before DistributedDataParallel waits for those of the others: it queues its wait while gradients come in, and
    this is queued before the first of them. On a GPU the work up to there has been launched, and the wait has not.
    """
    engine = torch.autograd.Variable._execution_engine
    if loss.requires_grad:
        loss.register_hook(lambda gradient: engine.queue_callback(call))  # type: ignore[no-untyped-call]


def has_comm_hook(trainer: pl.Trainer) -> bool:
    """Whether gradients are summed over ranks by a hook of the user's."""
    return getattr(trainer.strategy, "_ddp_comm_hook", None) is not None
