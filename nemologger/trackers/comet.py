"""Comet: one experiment for all lives of a run, online and offline."""

from __future__ import annotations

import json
import logging
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CometLogger as LightningCometLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger.disk import LocalDisk
from nemologger.trackers.tracker import Logged, Tracker, environment, require

if TYPE_CHECKING:
    from comet_ml import CometExperiment

log = logging.getLogger(__name__)

_ONLINE = "COMET_START_ONLINE"
_MESSAGES = "messages.json"
_UNFINISHED = "unfinished"


class CometLogger(Tracker, LightningCometLogger):
    """Lightning's CometLogger, opened late, with one Comet experiment for all lives of a run.

    The experiment's key is in ``comet_id.txt`` of the run directory; a resumed run goes on with it. A run that starts again
    at step 0 in a used directory is a new experiment.

    Offline, each life leaves an archive ``<key>-….zip`` in ``offline_directory`` for ``comet upload``, which puts them
    together. A killed process leaves none: its messages are made one by the next life. Steps that are in the archives
    already are not logged again. Online, steps that come again are logged again.

    Args:
        api_key: Default: the environment variable ``COMET_API_KEY``, or Comet's configuration file.
        workspace: Default: yours.
        project: Default: Comet's "Uncategorized".
        experiment_key: An experiment to go on with, instead of the kept one.
        mode: As ``comet_ml.start``: ``"get_or_create"``, ``"get"`` or ``"create"``.
        online: False for an offline experiment, True for none. Default: the environment variable
            ``COMET_START_ONLINE``, else online.
        prefix: Put before the names of metrics, with an underscore.
        **kwargs: Of ``comet_ml.ExperimentConfig``; ``offline_directory`` is ``comet`` by default, below the run
            directory, and ``auto_metric_logging`` is off.

    Raises:
        ConfigurationError: Comet is not installed.

    Example:
        >>> logger = CometLogger(project="demo", online=False)
        >>> logger.is_open  # the experiment begins when a run uses it
        False
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        require("comet_ml", "comet", "CometLogger")
        self._made = False
        self._is_kept = False
        self._given_key, self._title, self._name_prefix = experiment_key, project, prefix
        self._wants_online, self._directory = online, kwargs.pop("offline_directory", None) or "comet"
        self._settings: dict[str, Any] = {
            "api_key": api_key,
            "workspace": workspace,
            "project": project,
            "mode": mode,
            "prefix": prefix,
            # Else Comet also takes down what TensorBoard and others log: every step twice.
            "auto_metric_logging": False,
            **kwargs,
        }
        self._earlier: list[Path] = []

    @property
    def place(self) -> str:
        """The experiment."""
        return f"Comet experiment {self._given_key}" if self._given_key else "the Comet experiment of this run"

    @property
    def is_open(self) -> bool:
        """See :class:`Tracker`."""
        return self._made

    @property
    def save_dir(self) -> str:
        """Where offline experiments are."""
        return str(self._below(self._directory))

    @property
    def name(self) -> str | None:
        """The project."""
        return super().name if self._made else self._title

    @property
    def version(self) -> str | None:
        """The experiment's key, once there is one."""
        return super().version if self._made else None

    @property
    @rank_zero_experiment
    def experiment(self) -> CometExperiment:
        """Comet's experiment."""
        if not self._made:
            self._make(self._given_key or self._kept("comet").read())
        return super().experiment

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        rest = self._rest(metrics, step)
        if rest:
            LightningCometLogger.log_metrics(self, rest, step)

    def _go_on(self, step: int | None) -> None:
        """Leave out from now on what the archives have already."""
        _ = self.experiment
        self._finish_earlier()
        if self._is_kept:
            steps = self._archived_steps()
            self._logged = Logged(lambda name: steps.get(name, ()))

    def _start_over(self) -> None:
        """Begin another experiment, if the opened one is an earlier life's."""
        experiment = self.experiment
        self._finish_earlier()
        if self._is_kept and self._given_key is None:
            earlier = self.version
            experiment.end()
            self._make(None)
            log.warning("training starts at step 0: Comet experiment %s begins, %s is left", self.version, earlier)

    def _flush(self) -> None:
        self.experiment.flush(timeout=10)

    def _end(self, status: str) -> None:
        """Comet ends the experiment when the process ends."""
        LightningCometLogger.finalize(self, status)

    @rank_zero_only
    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Log the model's graph."""
        if self._made:
            self._outbox.put("the graph", lambda: LightningCometLogger.log_graph(self, *args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() if self._made else self.__dict__.copy()

    # --- the experiment -----------------------------------------------------------------------------------------------

    def _make(self, key: str | None) -> None:
        from comet_ml import generate_guid, get_config

        given, key = key, key or generate_guid()
        offline = self._wants_online is False or (
            self._wants_online is None and _starts_offline(get_config("comet.start.online"))
        )
        messages = Path(self.save_dir, _UNFINISHED, key)
        self._earlier = [*Path(self.save_dir).glob("*.zip")]
        if offline:
            messages.mkdir(parents=True, exist_ok=True)
        with _started_offline(messages) if offline else nullcontext():
            LightningCometLogger.__init__(
                self,
                experiment_key=key,
                online=None if offline else self._wants_online,  # it takes False for "log nothing"
                offline_directory=self.save_dir,
                **self._settings,
            )
        self._made, self._is_kept = True, given is not None
        self._kept("comet").write(str(self.version))

    def _name_of(self, key: str) -> str:
        return f"{self._name_prefix}_{key}" if self._name_prefix else key

    def _write_params(self, params: dict[str, Any]) -> None:
        _ = self.experiment
        LightningCometLogger.log_hyperparams(self, params)

    # --- what earlier lives have left ---------------------------------------------------------------------------------

    def _finish_earlier(self) -> None:
        """Make archives of what killed processes have left. For a run that has its directory to itself."""
        from comet_ml.offline_utils import create_experiment_archive, write_experiment_meta_file

        mine = Path(self.experiment.tmpdir)
        for messages in sorted(Path(self.save_dir, _UNFINISHED).glob(f"*/*/{_MESSAGES}")):
            left = messages.parent
            if left == mine:
                continue
            key = left.parent.name
            write_experiment_meta_file(
                tempdir=str(left),
                experiment_key=key,
                workspace=self._settings["workspace"],
                project_name=self._title,
                start_time=_first_time(messages),
                stop_time=int(messages.stat().st_mtime * 1000),
                tags=[],
                resume_strategy="get_or_create",
                user_provided_experiment_key=True,
                comet_start_sourced=True,
            )
            archive, _ = create_experiment_archive(
                offline_directory=self.save_dir,
                offline_archive_file_name=f"{key}-{left.name}.zip",
                data_dir=str(left),
                logger=log,
            )
            log.info("%s: what a killed process had logged", archive)
            LocalDisk().remove(left)
        for archive in self._earlier:
            with zipfile.ZipFile(archive) as files:
                is_empty = not files.namelist()
            if is_empty:  # Comet makes it in advance
                LocalDisk().remove(archive)

    def _archived_steps(self) -> dict[str, set[int]]:
        steps: dict[str, set[int]] = {}
        for archive in Path(self.save_dir).glob(f"{self.version}*.zip"):
            with zipfile.ZipFile(archive) as files, suppress(KeyError), files.open(_MESSAGES) as lines:
                for metric in _metrics(lines):
                    if metric.get("step") is not None:
                        steps.setdefault(metric["metricName"], set()).add(int(metric["step"]))
        return steps


def _starts_offline(online: object) -> bool:
    """What Comet's setting ``comet.start.online`` says; nothing unless somebody has set it."""
    return str(online).lower() in {"0", "false", "no", "off"}


def _metrics(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for message in _messages(lines):
        if message.get("type") == "metric_msg":
            yield message["payload"]["metric"]


def _messages(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(ValueError):  # the process was killed while it wrote
            yield json.loads(line)


def _first_time(messages: Path) -> int:
    """When the first of ``messages`` was logged, in ms."""
    with messages.open("rb") as lines:
        times = (message.get("payload", {}).get("local_timestamp") for message in _messages(lines))
        return next((int(time) for time in times if time), int(messages.stat().st_mtime * 1000))


@contextmanager
def _started_offline(directory: Path) -> Iterator[None]:
    """Let an experiment that is made now be an offline one, and keep its messages in ``directory`` until it ends.

    Comet keeps them in the directory for temporary files, where nobody would look for them after a crash.
    """
    temporary, tempfile.tempdir = tempfile.tempdir, str(directory)
    try:
        with environment(_ONLINE, "0"):
            yield
    finally:
        tempfile.tempdir = temporary
