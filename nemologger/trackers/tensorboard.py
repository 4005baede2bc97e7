"""TensorBoard: its place in the run directory, and curves that go on where the resumed checkpoint was."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from nemologger import lightning_port
from nemologger.disk.there import is_dir
from nemologger.errors import ConfigurationError
from nemologger.run.directory import RunDirectory

log = logging.getLogger(__name__)


def move(logger: TensorBoardLogger, run: RunDirectory, homes: Iterable[str | Path], *, is_default: bool) -> None:
    """Let ``logger`` write to ``exp_dir / save_dir / <its name> / <version>``.

    Args:
        logger: Not open yet.
        run: The run.
        homes: As for :meth:`~nemologger.run.directory.RunDirectory.tracker_dir`.
        is_default: It is the one that a Trainer makes by itself: nobody chose its name, and runs that share it would be
            drawn as one. It writes to the run directory.
    """
    if is_default:
        save_dir, name = run.exp_dir, run.name
    else:
        save_dir, name = run.tracker_dir(logger.save_dir, homes), logger.name
    lightning_port.move_tensorboard(logger, save_dir, name, run.version or "")
    if _event_files(logger):
        # The placeholder metric is logged at step 0 by every life of the run.
        lightning_port.move_tensorboard(logger, save_dir, name, run.version or "", default_hp_metric=False)
        wait_for_a_later_name(logger)


def wait_for_a_later_name(logger: TensorBoardLogger) -> None:
    """Let the second pass in which a file of ``logger`` was begun, if it is this one.

    TensorBoard reads files in the order of their names, a time in seconds and then a counter without leading zeros: it would
    read the tenth file of a process before the ninth of the same second, and show their steps in that order.
    """
    now = time.time()
    seconds, _ = _newest(logger)
    if seconds == int(now):
        time.sleep(seconds + 1 - now)


def check_apart(loggers: Iterable[object]) -> None:
    """See to it that no two loggers write to one directory.

    Raises:
        ConfigurationError: If two do. TensorBoard takes the one that began later for the next life of the other, and hides
            what that one logs.
    """
    there: dict[str, TensorBoardLogger] = {}
    for logger in (logger for logger in loggers if isinstance(logger, TensorBoardLogger)):
        place = lightning_port.tensorboard_place(logger)
        if place is not None and there.setdefault(place, logger) is not logger:
            raise ConfigurationError(
                f"two TensorBoardLoggers would both write to {place}, and TensorBoard would show only a part of what they "
                "log: give each a name or a sub_dir of its own (the version is that of the run), or leave one out"
            )


def has_earlier_files(logger: TensorBoardLogger) -> bool:
    """Whether there are event files besides the one that ``logger`` writes."""
    return len(_event_files(logger)) > 1


def void_from(logger: TensorBoardLogger, step: int) -> None:
    """Declare ``step`` and later ones void, in TensorBoard's own way: by a session start at that step.

    They stay in the event files; TensorBoard no longer shows them.
    """
    _warn_of_clock(logger)
    # Here: TensorBoard's classes are loaded when there is a writer, which has loaded them.
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

    writer = logger.experiment
    if writer.file_writer is None:
        writer.purge_step = step  # it writes the same event when it opens its next file
    else:
        writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


def _warn_of_clock(logger: TensorBoardLogger) -> None:
    """Say so if TensorBoard reads this life before an earlier one: it goes by the seconds in the names of the files.

    The clock has been set back, or the run has moved to a host where it is behind.
    """
    seconds, newest = _newest(logger)
    if seconds > time.time():
        log.warning(
            "%s is of an earlier life of this run, and %.0f s ahead of the clock of this host: TensorBoard takes it for the "
            "later one, and may hide what is logged from now on. Set the clock and start again, or give the file a name "
            "with an earlier time.",
            newest,
            seconds - time.time(),
        )


def _event_files(logger: TensorBoardLogger) -> list[Path]:
    directory = Path(logger.log_dir)
    return [*directory.glob("events.out.tfevents.*")] if is_dir(directory) else []


def _newest(logger: TensorBoardLogger) -> tuple[int, Path | None]:
    """The latest second in which a file was begun, by the files' names, and the file."""
    found = ((re.match(r"events\.out\.tfevents\.(\d+)\.", file.name), file) for file in _event_files(logger))
    return max(((int(match[1]), file) for match, file in found if match), default=(0, None))
