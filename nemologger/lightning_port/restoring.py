"""How what a checkpoint holds gets into the trainer, and through whose hands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.hooks import CheckpointHooks
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from nemologger import sharded_state
from nemologger.lightning_port.hooks import callbacks

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO


def use_checkpoint_io(
    trainer: pl.Trainer,
    plugin: CheckpointIO,
    load: Callable[[str | Path], dict[str, Any] | None],
    align: Callable[[], None],
) -> None:
    """Let the trainer's strategy read and write checkpoints through ``plugin``.

    Args:
        trainer: The trainer.
        plugin: For strategies that use one.
        load: For those that do not, because they restore model and optimizers themselves: does so, and returns Lightning's
            dictionary; or None to leave it to the strategy.
        align: For the others: called when there are optimizers, before they get what the plugin has returned for them.
    """
    strategy = trainer.strategy
    strategy.checkpoint_io = plugin
    if not sharded_state.shards_state(strategy):
        strategy.load_optimizer_state_dict = _Aligned(strategy, align)  # type: ignore[method-assign]
        return
    inner = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        loaded = load(checkpoint_path)
        return inner(checkpoint_path, weights_only=weights_only) if loaded is None else loaded

    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


class _Aligned:
    """A strategy's ``load_optimizer_state_dict``, and what comes before. Strategies are sent to processes: no closure."""

    def __init__(self, strategy: Strategy, align: Callable[[], None]) -> None:
        self._align = align
        self.__func__ = type(strategy).load_optimizer_state_dict
        self._strategy = strategy

    def __call__(self, checkpoint: Mapping[str, Any]) -> None:
        self._align()
        self.__func__(self._strategy, checkpoint)


def is_in_hook(trainer: pl.Trainer) -> bool:
    """Whether a hook of a callback or of the module is running, rather than the trainer itself."""
    module = trainer.strategy.lightning_module
    return module is not None and module._current_fx_name is not None


def restore_again(trainer: pl.Trainer, path: str | Path | None, weights_only: bool | None) -> None:
    """For ``on_fit_start``: go on from ``path``, whatever callbacks, and earlier fits of this trainer, have done meanwhile.

    LearningRateFinder and BatchSizeFinder try things out and put back what was there before. With that, Lightning takes the
    checkpoint that it was to go on from for restored, and would begin at step 0.

    Args:
        trainer: The trainer. Where its strategy restores later, that is not yet so.
        path: What it is to go on from.
        weights_only: As it was loaded.
    """
    # Of this fit there has been no validation. Else Lightning takes the epoch that it was saved at the end of for over, and
    # then all that follow.
    trainer.fit_loop.epoch_loop.val_loop._has_run = False
    connector = trainer._checkpoint_connector
    if connector._ckpt_path == path or trainer.strategy.restore_checkpoint_after_setup:
        return
    if path is None:
        connector._ckpt_path = None  # what the callback has put back is not a checkpoint of the run
    else:
        connector._restore_modules_and_callbacks(path, weights_only)


def settle_precision(trainer: pl.Trainer) -> None:
    """Give the module the precision that it is trained in, before it gets its weights.

    Lightning does so afterwards: with ``precision="64-true"`` the weights would go through the 32 bits that the program made
    the module with, and a resumed run begin with rounded ones.
    """
    module, plugin = trainer.strategy.lightning_module, trainer.precision_plugin
    if module is not None and isinstance(plugin, DoublePrecision):
        plugin.convert_module(module)


def loads_as_is(trainer: pl.Trainer, module: pl.LightningModule | None) -> bool:
    """Whether the model's state dictionary that a checkpoint plugin returns goes to ``module`` as it is.

    That is: no code but Lightning's and ours gets to see it on its way, or later, which might change it or keep it.
    """
    strategy = trainer.strategy
    if not loads_model_as_is(strategy) or (module is not None and will_rewrite_state(module)):
        return False
    theirs = [
        *(callback.on_load_checkpoint for callback in callbacks(trainer)),
        trainer.precision_plugin.on_load_checkpoint,
        strategy.load_checkpoint,
        strategy.load_optimizer_state_dict,
    ]
    return all(_is_known(method) for method in theirs)


def loads_model_as_is(strategy: Strategy) -> bool:
    """Whether ``strategy`` hands a state dictionary to ``load_state_dict`` of the module, and that is all it does."""
    plain = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    return plain and getattr(strategy.load_model_state_dict, "__func__", None) is Strategy.load_model_state_dict


def will_rewrite_state(module: pl.LightningModule) -> bool:
    """Whether loading may legitimately bring other keys than the module has."""
    return not module.strict_loading or is_overridden("on_load_checkpoint", module)


def _is_known(method: Any) -> bool:
    """Whether ``method`` is Lightning's that leaves a checkpoint alone, or ours."""
    function = getattr(method, "__func__", None)
    module = getattr(function, "__module__", "")
    return module.startswith("nemologger.") or module in _LEAVE_CHECKPOINTS_ALONE


_LEAVE_CHECKPOINTS_ALONE = (
    Callback.__module__,
    CheckpointHooks.__module__,
    Strategy.__module__,
)
