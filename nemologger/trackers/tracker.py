"""What the trackers of this package have in common: where they write, and which of their runs they go on with."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger.checkpoint import manifest
from nemologger.disk import LocalDisk
from nemologger.disk.there import exists, is_file
from nemologger.errors import ConfigurationError, DamagedCheckpointError
from nemologger.run.directory import RunDirectory
from nemologger.saving.kept_checkpoints import KeptCheckpoints
from nemologger.trackers.outbox import PATIENCE, Outbox

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint


log = logging.getLogger(__name__)


class Tracker:
    """A logger of Lightning's that is given its run directory before it opens anything. A base beside ``Logger``.

    Lightning opens loggers at the start of ``fit``, before it has looked at the checkpoint: which of its runs a tracker
    opens, it decides by the id in the run directory. When training begins it is told how it began, by :meth:`go_on` or
    :meth:`start_over`. Hyperparameters wait until then: they belong to the run that will be logged to.

    One that cannot be opened is an error. From then on, nothing that it does or fails to do ends training, or makes it
    wait for long: its calls, which are in the methods with an underscore, go through an
    :class:`~nemologger.trackers.outbox.Outbox`.
    """

    #: What to do instead of leaving out one of two that write to the same place, for a message.
    apart_by = ""

    _run: RunDirectory | None = None
    _moves = True
    _params: dict[str, Any] | None = None
    _has_begun = False
    _logged: Logged | None = None
    _is_remote = True
    _calls: Outbox | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has started to write."""
        raise NotImplementedError

    @property
    def place(self) -> str | None:
        """What it writes to, and no other tracker may; None for nothing."""
        raise NotImplementedError

    def settle(self, run: RunDirectory, *, move: bool) -> None:
        """Take ``run`` as the run to log for. On every rank, before it is open.

        Args:
            run: The run.
            move: Whether relative directories are meant to be below the run directory, rather than the working one.
        """
        self._run, self._moves = run, move

    def go_on(self, step: int | None) -> None:
        """Training goes on from a checkpoint. On rank 0.

        Args:
            step: What is logged next, and was not yet trained when the checkpoint was saved; None if the model counts
                steps in a unit of its own.
        """
        _ = self.experiment
        self._outbox.put("how training begins", lambda: self._go_on(step))
        self._begin()

    def start_over(self) -> None:
        """Training begins at step 0, in a directory where an earlier life may have logged. On rank 0."""
        _ = self.experiment
        self._outbox.put("how training begins", self._start_over)
        self._begin()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None, *_: Any, **__: Any) -> None:
        """Log hyperparameters. During ``fit`` they are written when training begins."""
        given = vars(params) if isinstance(params, Namespace) else dict(params or {})
        self._params = {**(self._params or {}), **given}
        if self._has_begun or self._run is None:
            self._begin()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log ``metrics`` at ``step``, as far as the earlier life has not."""
        _ = self.experiment
        given = dict(metrics)
        self._outbox.put(f"metrics of step {step}", lambda: self._log(given, step))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A checkpoint is there: have what was logged out of this process, and upload, if that is wanted."""
        if not self.is_open:
            return
        self._outbox.put("what was logged before a checkpoint", self._flush, repeatable=True)
        if self._uploads:
            if isinstance(checkpoint_callback, KeptCheckpoints):
                checkpoint_callback.finish_removals()  # none of them changes while it is read
            self._outbox.put("checkpoints", lambda: self._upload(checkpoint_callback), patience=float("inf"))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Have all that was logged out of this process, and say how the run has ended."""
        if self._params is not None:
            self._begin()
        if not self.is_open:
            return
        self._outbox.put("how the run has ended", lambda: self._end(status))
        self._outbox.finish(None if status == "success" else 3 * PATIENCE)

    # --- what a tracker does with it ------------------------------------------------------------------------------

    if TYPE_CHECKING:  # Lightning's logger, which comes after this base, has it

        @property
        def experiment(self) -> Any:
            """What the tracker is to its own package. Opens it."""

    #: Whether checkpoints are wanted as soon as they are saved.
    _uploads = False

    def _go_on(self, step: int | None) -> None:
        """See :meth:`go_on`."""

    def _start_over(self) -> None:
        """See :meth:`start_over`."""

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        """See :meth:`log_metrics`."""
        raise NotImplementedError

    def _write_params(self, params: dict[str, Any]) -> None:
        """See :meth:`log_hyperparams`."""
        raise NotImplementedError

    def _flush(self) -> None:
        """Have what was logged out of this process."""

    def _upload(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload the checkpoints that are not."""

    def _end(self, status: str) -> None:
        """See :meth:`finalize`."""

    # --- what they have in common ---------------------------------------------------------------------------------

    @property
    def _outbox(self) -> Outbox:
        if self._calls is None:
            self._calls = Outbox(type(self).__name__, beside=self._is_remote)
        return self._calls

    def _begin(self) -> None:
        """Write the hyperparameters that have waited."""
        self._has_begun = True
        params, self._params = self._params, None
        if params is not None:
            _ = self.experiment
            self._outbox.put("hyperparameters", lambda: self._write_params(params))

    def _rest(self, metrics: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """What is to be logged of ``metrics`` at ``step``: what an earlier life has not."""
        return dict(metrics) if self._logged is None else self._logged.rest(metrics, step, self._name_of)

    def _name_of(self, key: str) -> str:
        """What the tracker calls the metric ``key``."""
        return key

    def _below(self, directory: str | os.PathLike[str]) -> Path:
        """``directory``, seen from the run directory."""
        home = self._run.log_dir if self._run is not None and self._moves else Path.cwd()
        return home / Path(directory).expanduser()

    def _kept(self, tracker: str, of: str = "") -> KeptId:
        """Where the id of this tracker's run is kept between the lives of a run."""
        return KeptId(None if self._run is None else self._run.log_dir / f"{tracker}_id.txt", of)


class KeptId:
    """The id under which a tracker knows a run, in a file of the run directory: one line per store.

    Args:
        file: The file; None if there is no run directory, and nothing is kept.
        of: Which store it is, if there may be several; no line breaks.

    Example:
        >>> import tempfile
        >>> kept = KeptId(Path(tempfile.mkdtemp(), "mlflow_id.txt"), "demo http://127.0.0.1:5000")
        >>> kept.write("1f2e")
        >>> kept.read()
        '1f2e'
    """

    def __init__(self, file: Path | None, of: str = "") -> None:
        self._file, self._of = file, of

    def read(self) -> str | None:
        """The id, None if there is none."""
        return self._lines().get(self._of)

    def write(self, run_id: str) -> None:
        """Keep ``run_id`` in place of the one before."""
        lines = self._lines()
        if self._file is None or lines.get(self._of) == run_id:
            return
        lines[self._of] = run_id
        disk = LocalDisk()
        disk.make_directory(self._file.parent)
        disk.write(self._file, [f"{one} {of}".rstrip().encode() + b"\n" for of, one in lines.items()])
        disk.sync(self._file.parent)

    def _lines(self) -> dict[str, str]:
        if self._file is None or not is_file(self._file):
            return {}
        pairs = [line.partition(" ") for line in self._file.read_text(encoding="utf-8").splitlines()]
        return {of: run_id for run_id, _, of in pairs}


class Logged:
    """Which metrics an earlier life has already logged at which steps: a run that goes on leaves them out.

    A resumed run repeats the uninterrupted one bit for bit, so that the value that stays is the value left out.

    Args:
        steps: The steps that a metric has in the tracker, by its name there. Asked once for each metric.

    Example:
        >>> logged = Logged(lambda name: {"loss": [0, 1]}.get(name, []))
        >>> logged.rest({"loss": 0.5, "accuracy": 0.9}, 1)
        {'accuracy': 0.9}
        >>> logged.rest({"loss": 0.5}, 2)
        {'loss': 0.5}
    """

    def __init__(self, steps: Callable[[str], Iterable[int]]) -> None:
        self._ask = steps
        self._steps: dict[str, frozenset[int]] = {}

    def rest(
        self, metrics: Mapping[str, Any], step: int | None, name: Callable[[str], str] = lambda key: key
    ) -> dict[str, Any]:
        """The metrics that are new at ``step``; ``name`` is what the tracker calls a metric."""
        return {key: value for key, value in metrics.items() if step is None or step not in self._of(name(key))}

    def _of(self, name: str) -> frozenset[int]:
        if name not in self._steps:
            self._steps[name] = frozenset(self._ask(name))
        return self._steps[name]


def require(package: str, extra: str, what: str) -> None:
    """Say how to install what is missing.

    Raises:
        ConfigurationError: ``package`` is not installed.
    """
    if find_spec(package) is None:
        raise ConfigurationError(
            f"{what} needs the package {package}, which is not installed: pip install 'nemologger[{extra}]'"
        )


@contextmanager
def environment(name: str, value: str | None = None) -> Iterator[None]:
    """Let an environment variable be ``value``, or stay if that is None; what others do to it meanwhile is undone."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def check_apart(loggers: Iterable[object]) -> None:
    """See to it that no two trackers of this package write to one place.

    Raises:
        ConfigurationError: If two do. Each step would be there twice, and a resume would take one for the other.
    """
    there: dict[str, Tracker] = {}
    for tracker in (logger for logger in loggers if isinstance(logger, Tracker)):
        place = tracker.place
        if place is None:
            continue
        other = there.setdefault(place, tracker)
        if other is not tracker:
            raise ConfigurationError(
                f"two loggers, {type(other).__name__} and {type(tracker).__name__}, would both write to {place}: "
                f"every step would be there twice. Leave one out{tracker.apart_by}."
            )


def checkpoints_of(checkpoint: ModelCheckpoint) -> list[Path]:
    """The checkpoints that ``checkpoint`` keeps, files or directories, the last one last. None that are in a store."""
    paths = [*checkpoint.best_k_models, checkpoint.best_model_path, checkpoint.last_model_path]
    there = dict.fromkeys(Path(path).resolve() for path in paths if path and exists(Path(path)))
    return sorted(there, key=_saved_at)


class Uploaded:
    """Which checkpoints a tracker has, so that each is uploaded once.

    Args:
        tracker: Its name, for a warning where checkpoints are in a store: those are not copied to another place.
    """

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._has_warned = False
        self._times: dict[Path, float] = {}

    def new(self, checkpoint: ModelCheckpoint) -> list[Path]:
        """Those of :func:`checkpoints_of` that have not been uploaded."""
        if "://" in str(getattr(checkpoint, "dirpath", "")) and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: log_model has no effect for the checkpoints in %s: they are in a store already, and not copied",
                self._tracker,
                checkpoint.dirpath,
            )
        return [path for path in checkpoints_of(checkpoint) if self._times.get(path) != _saved_at(path)]

    def add(self, path: Path) -> None:
        """``path`` has been uploaded."""
        self._times[path] = _saved_at(path)


def _saved_at(path: Path) -> float:
    """When the checkpoint at ``path`` was saved. A directory also changes when its optimizer state is taken away."""
    try:
        return manifest.read(path).time
    except DamagedCheckpointError:  # Lightning's
        return path.stat().st_mtime
