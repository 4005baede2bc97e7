"""Callbacks' states in a checkpoint, under the names that the callbacks of a trainer have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemologger import lightning_port

if TYPE_CHECKING:
    import lightning.pytorch as pl

_EXACT_RESUME = "ExactResume"  # the state_key of that callback
_OF_MODEL_CHECKPOINT = {"dirpath", "consumed_samples"}  # fields that only ours and its state have, both of them


def settle(trainer: pl.Trainer, states: dict[str, Any], *, is_fit: bool) -> dict[str, Any]:
    """``states`` as ``trainer`` is to see them.

    Lightning asks the user to add each callback that has a state and is not there. Of those that save and resume, a
    validation, a test or a prediction needs none. In a fit the state of a ModelCheckpoint whose interval or metric was
    changed since, which are in its name, goes to the one there is: it takes it under any name.

    Args:
        trainer: Whose callbacks.
        states: By ``state_key``, as they were saved.
        is_fit: Whether training goes on from the checkpoint.

    Returns:
        A dictionary of its own.
    """
    saved = [key for key, state in states.items() if isinstance(state, dict) and state.keys() >= _OF_MODEL_CHECKPOINT]
    if not is_fit:
        present = {callback.state_key for callback in lightning_port.callbacks(trainer)}
        return {key: state for key, state in states.items() if key in present or key not in {_EXACT_RESUME, *saved}}
    ours = [
        c.state_key for c in lightning_port.callbacks(trainer) if all(hasattr(c, name) for name in _OF_MODEL_CHECKPOINT)
    ]
    if len(saved) == len(ours) == 1:
        return {ours[0] if key == saved[0] else key: state for key, state in states.items()}
    return dict(states)
