"""The states of callbacks before a validation that there is only because training stops."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from nemologger import lightning_port
from nemologger.exact.values import plain_contents

if TYPE_CHECKING:
    import lightning.pytorch as pl


def states_of_callbacks(trainer: pl.Trainer) -> dict[str, Any]:
    """What they are to go on from, by Lightning's key: as if that validation had not been.

    These are EarlyStopping, and callbacks of the program (a patience or a best value of its own) whose state is plain and
    small. What has files or weights, as those that save, keeps what it has after the validation.
    """
    program = {id(callback) for callback in lightning_port.callbacks_of_the_program(trainer).values()}
    states: dict[str, Any] = {}
    for callback in lightning_port.callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            states[callback.state_key] = callback.state_dict()
        elif id(callback) in program and not isinstance(callback, Checkpoint):
            state = callback.state_dict()
            try:
                plain_contents.keep(state, [plain_contents.MOST_BYTES])
                # A copy of the same types: a Counter that comes back as a dictionary would raise in the next life.
                copied = deepcopy(state)
            except Exception:  # noqa: BLE001  not plain, or a tensor of a graph, which cannot be copied
                continue
            states |= {callback.state_key: copied} if copied else {}
    return states
