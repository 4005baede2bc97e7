"""What one fit says of its saves: of what they lack, once; and how many have failed in a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence

from nemologger.checkpoint.keeping.naming import fields
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.errors import ConfigurationError, SaveFailedError

log = logging.getLogger("nemologger.model_checkpoint")

_SHOWN = 5
#: Among what has been said, beside the places of what is left out.
_GROWN, _NO_METRIC, _NAME, _UNCOUNTED = "the model itself", "the metric", "the name", "the steps"
_NO_VALIDATION, _NOT_KEPT = "validation", "the newest"


class Notices:
    """Says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def _warn_once(self, what: str, message: str, *values: object) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(message, *values)

    def left_out(self, taken: Snapshot, name: str) -> None:
        """What the checkpoint ``name`` does not hold."""
        new = [where for where in taken.left_out if where not in self._said]
        self._said.update(new)
        own = [where for where in new if where in taken.places]
        for where in new:
            if where not in taken.places:
                log.warning("checkpoint %s, and later ones: %s is not saved: %s", name, where, taken.left_out[where])
        if own:
            log.info(
                "checkpoints do not hold %s, which have no plain form: a resumed run takes those that the program makes",
                ", ".join(own),
            )

    def uncounted(self, batches: int) -> None:
        """That Lightning has counted no step in so many ``batches``."""
        self._warn_once(
            _UNCOUNTED,
            "%d batches are trained, and Lightning has counted no step of an optimizer: with manual optimization it "
            "counts those of self.optimizers() only. Until it does, a batch counts as a step here; "
            "Trainer(max_steps=...) does not end such a run, and what is trained again after a kill is not compared",
            batches,
        )

    def no_validation(self, epoch: int) -> None:
        """That ``epoch`` has ended before the validation that it was to have."""
        self._warn_once(
            _NO_VALIDATION,
            "epoch %d has ended before its validation: it had fewer batches than val_check_interval, or than the "
            "__len__() of the data says, or a hook has ended it. Such epochs are saved without one; "
            "Trainer(check_val_every_n_epoch=None, val_check_interval=...) counts batches across epochs",
            epoch,
        )

    def not_kept(self, step: int, monitor: str | None, newest: str) -> None:
        """That ``step`` is not one of the best, and nobody keeps the newest: a metric that is NaN never is."""
        self._warn_once(
            _NOT_KEPT,
            "step %d, and maybe later ones, are not saved: they are none of the best by %r, and with save_last=False "
            "nothing else is. A run that is killed then goes on from %s; save_last=True keeps the newest, too",
            step,
            monitor,
            newest,
        )

    def grown(self, name: str, find: Callable[[], Sequence[str]]) -> None:
        """That the model has changed, as ``find`` says: whoever learns it at the next start has lost the training."""
        changes = [] if _GROWN in self._said else find()
        if changes:
            self._warn_once(
                _GROWN,
                "checkpoint %s, and later ones, are not of the model that training started with, so the same program cannot "
                "go on from them: %s. Let __init__(), configure_model() or configure_optimizers() make what a run comes to, "
                "as the module's on_load_checkpoint() finds it in the checkpoint",
                name,
                "; ".join(changes[:_SHOWN]) + (f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""),
            )

    def missing_metric(self, monitor: str, path: str, logged: Collection[str], *, validated: bool) -> None:
        """That ``monitor`` was not there for the save of ``path``.

        Raises:
            ConfigurationError: It should have been, since validation has run.
        """
        there = f"there are {sorted(logged)}. Call self.log({monitor!r}, ...) in the model, or monitor one of these"
        if validated:
            raise ConfigurationError(
                f"ModelCheckpoint(monitor={monitor!r}): validation has run, but no such metric was logged; {there}. "
                "One that is there only when an epoch of training ends needs save_on_train_epoch_end=True. "
                f"What was trained so far is in {path}."
            )
        self._warn_once(
            _NO_METRIC,
            "ModelCheckpoint(monitor=%r): no such metric has been logged yet, so %s is kept as the newest, not as one "
            "of the best; %s",
            monitor,
            path,
            there,
        )

    def missing_fields(self, filename: str, monitor: str | None, values: Collection[str]) -> None:
        """Which fields of the name nobody logs: a misspelt one is else noticed when the best is looked for."""
        absent = [name for name in fields(filename) if name not in values and name != monitor]
        if absent:
            self._warn_once(
                _NAME,
                "ModelCheckpoint(filename=%r): nobody has logged %s yet, and names are without it; there are %s",
                filename,
                " or ".join(map(repr, absent)),
                sorted(values),
            )


class Failures:
    """Counts the saves that have failed in a row.

    Args:
        most: So many end the run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0

    def end(self) -> None:
        """A save has succeeded."""
        self._count = 0

    def add(self, error: SaveFailedError, newest: str | None, *, final: bool) -> None:
        """Report one; ``newest`` is the checkpoint that there is.

        Raises:
            SaveFailedError: It is one too many, or the ``final`` one.
        """
        self._count += 1
        if final:
            raise error
        there = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
        if self._count >= self._most:
            count = f"save {self._count} in a row that failed (max_failed_saves={self._most})"
            raise SaveFailedError(f"{error}. Training stops at {count}; {there}.") from error.__cause__
        log.error(
            "save %d of at most %d in a row that may fail: %s. Training goes on; %s.",
            self._count,
            self._most,
            error,
            there,
        )
