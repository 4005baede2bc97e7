"""ClearML: one task for all lives of a run, online and offline."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger

from nemologger.disk.there import is_dir, is_file
from nemologger.trackers.tracker import Logged, Tracker, Uploaded, environment, require

if TYPE_CHECKING:
    from clearml import OutputModel, Task
    from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)

_CACHE = "CLEARML_CACHE_DIR"
_SCALAR = "training_stats_scalar"

#: The tasks that loggers of this process have begun: ClearML's current task is the process's, too.
_OF_RUNS: set[str] = set()


class ClearMLLogger(Tracker, Logger):
    """Metrics, hyperparameters and checkpoints as a ClearML task, one for all lives of a run.

    The task's id is in ``clearml_id.txt`` of the run directory; a resumed run goes on with it. Steps that the earlier life
    logged after its last checkpoint are not logged again. A run that starts again at step 0 in a used directory is a
    new task.

    Offline, the task is the directory ``clearml/offline/<id>`` of the run directory, for
    ``Task.import_offline_session``. Metrics are in its file as soon as they are logged: ClearML itself keeps those of an
    offline task in memory until it is closed, and a killed process would take them along.

    Args:
        project: Default: the experiment's name. The environment variable ``CLEARML_PROJECT`` wins.
        task: Default: the run's version. The environment variable ``CLEARML_TASK`` wins.
        connect_pytorch: Let ClearML record what ``torch.save`` writes.
        model_name: Name of the model in ClearML; default: the task's.
        tags: Of the task.
        log_model: Also register the newest kept checkpoint as the task's output model, each time one is saved. Not
            offline, where ClearML cannot.
        log_cfg: With ``log_model``: also keep the hyperparameters with the model.
        log_metrics: With ``log_model``: also keep the last metrics with the model.
        offline: Work without a server. Default: the environment variable ``CLEARML_OFFLINE_MODE``.

    Raises:
        ConfigurationError: ClearML is not installed.

    Example:
        >>> logger = ClearMLLogger(project="demo", offline=True)
        >>> logger.is_open  # the task begins when a run uses it
        False
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        task: str | None = None,
        connect_pytorch: bool | None = False,
        model_name: str | None = None,
        tags: list[str] | None = None,
        log_model: bool | None = False,
        log_cfg: bool | None = False,
        log_metrics: bool | None = False,
        offline: bool | None = None,
    ) -> None:
        require("clearml", "clearml", "ClearMLLogger")
        super().__init__()
        if (log_cfg or log_metrics) and not log_model:
            log.warning("ClearMLLogger: log_cfg and log_metrics keep something with the model; log_model is False")
        self._project, self._title, self._tags = project, task, list(tags or [])
        self._connect_pytorch, self._offline = bool(connect_pytorch), offline
        self._model_title, self._wants_model = model_name, bool(log_model)
        self._keeps_params, self._keeps_metrics = bool(log_cfg), bool(log_metrics)
        self._task: Task | None = None
        self._model: OutputModel | None = None
        self._is_kept = False
        self._uploaded = Uploaded("ClearMLLogger")
        self._last: dict[str, Any] = {}
        self._design: dict[str, Any] | None = None
        self._file: _OfflineMetrics | None = None

    @property
    def place(self) -> str:
        """A process has one task."""
        return "the ClearML task of this run"

    @property
    def is_open(self) -> bool:
        """See :class:`Tracker`."""
        return self._task is not None

    @property
    def name(self) -> str:
        """The project."""
        return os.environ.get("CLEARML_PROJECT") or self._project or (self._run and self._run.name) or "nemologger"

    @property
    def version(self) -> str | None:
        """The task's id, once there is one."""
        return None if self._task is None else str(self._task.id)

    @property
    def save_dir(self) -> str:
        """Where offline tasks are."""
        return str(self._below("clearml"))

    @property
    @rank_zero_experiment
    def experiment(self) -> Task:
        """ClearML's task."""
        return self._task or self._make(self._kept("clearml").read())

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        rest = self._rest(metrics, step)
        task = self.experiment
        self._last.update(metrics)
        if self._file is not None:
            self._file.append(rest, step or 0)
            return
        for key, value in rest.items():
            title, series = _title_and_series(key)
            task.get_logger().report_scalar(title, series, value, step or 0)

    def _go_on(self, step: int | None) -> None:
        """Leave out from now on what is logged already."""
        task = self.experiment
        if self._is_kept:
            steps = _online_steps(task) if self._file is None else self._file.steps()
            self._logged = Logged(lambda key: steps.get(_title_and_series(key), ()))

    def _start_over(self) -> None:
        """Begin another task, if the opened one is an earlier life's."""
        task = self.experiment
        if self._is_kept:
            task.close()
            self._task = self._model = None
            self._make(None)
            log.warning("training starts at step 0: ClearML task %s begins, and %s is left", self.version, task.id)

    @property
    def _uploads(self) -> bool:  # type: ignore[override]
        return self._wants_model and self._file is None

    def _upload(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Register the newest checkpoint as the task's output model."""
        checkpoints = self._uploaded.new(checkpoint_callback)
        if not checkpoints:
            return
        model, newest = self._output_model(), checkpoints[-1]
        if is_dir(newest):
            model.update_weights_package(weights_path=str(newest), auto_delete_file=False)
        else:
            model.update_weights(weights_filename=str(newest), auto_delete_file=False)
        if self._keeps_metrics and self._last:
            last = {key: {"value": str(value), "type": type(value).__name__} for key, value in self._last.items()}
            model.set_all_metadata(last)
        for path in checkpoints:
            self._uploaded.add(path)

    def _end(self, status: str) -> None:
        """Send what waits. ClearML says how the task has ended when the process ends.

        Said now, it would end the process, which may go on to test or to export: ClearML's watcher takes any end of a
        task that it has not written itself for the user's stop.
        """
        if self._task is not None:
            self._task.flush()

    # --- the task -----------------------------------------------------------------------------------------------------

    def _make(self, task_id: str | None) -> Task:
        from clearml import Task

        if self._offline:
            Task.set_offline(True)
        offline = Task.is_offline()
        running = Task.current_task()
        if running is not None and running.id in _OF_RUNS and running.id != task_id:
            running.close()  # another run's, which is over: ClearML knows one task per process
            running = None
        if running is not None:
            self._task, self._is_kept = running, running.id == task_id  # else it is the script's own
        else:
            # Its reports would come from a process that it forks while a thread of its own asks git. If the child gets hold
            # of that pipe, closing the task waits for ever.
            Task._report_subprocess_enabled = False  # noqa: SLF001  there is only a configuration file for it
            # Where an offline task has its files, only this says.
            with environment(_CACHE, self.save_dir if offline else None):
                self._task = _init_without_signals(
                    project_name=self.name,
                    task_name=os.environ.get("CLEARML_TASK") or self._title or self._run_title(),
                    tags=self._tags or None,
                    reuse_last_task_id=task_id or False,
                    continue_last_task=0 if task_id else False,  # 0: and do not move the steps
                    output_uri=True if self._wants_model else None,
                    auto_connect_frameworks={"pytorch": self._connect_pytorch, "tensorboard": False},
                )
            _OF_RUNS.add(self._task.id)
            self._is_kept = self._task.id == task_id
            if task_id and not self._is_kept:
                log.warning("ClearML task %s, which this run logged to, is gone: %s begins", task_id, self._task.id)
        self._file = _OfflineMetrics(self._task) if offline else None
        if offline and self._wants_model:
            log.warning("log_model=True has no effect: ClearML 2.1 fails to register a model of an offline task")
        self._kept("clearml").write(self._task.id)
        return self._task

    def _run_title(self) -> str:
        return "run" if self._run is None else self._run.version or self._run.log_dir.name

    def _output_model(self) -> OutputModel:
        if self._model is None:
            from clearml import OutputModel

            task = self.experiment
            self._model = OutputModel(
                task=task,
                name=self._model_title or task.name,
                tags=self._tags,
                framework="PyTorch",
                config_dict=self._design,
            )
        return self._model

    def _write_params(self, params: dict[str, Any]) -> None:
        self.experiment.connect(dict(params), name="hyperparameters")
        if self._keeps_params:
            self._design = json.loads(json.dumps(params, default=str))


class _OfflineMetrics:
    """The metrics of an offline task, in the file that ``Task.import_offline_session`` reads."""

    def __init__(self, task: Task) -> None:
        from clearml.backend_interface.metrics import Metrics

        self._id = task.id
        self._path = Path(str(task.get_offline_mode_folder()), "metrics.jsonl")
        self._metrics = Metrics(session=task.session, task=task, storage_uri="")

    def append(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write ``metrics`` of ``step`` at once."""
        from clearml.backend_interface.metrics.events import ScalarEvent

        names = {key: _title_and_series(key) for key in metrics}
        events = [
            ScalarEvent(metric=names[key][0], variant=names[key][1], value=float(value), iter=step)
            for key, value in metrics.items()
        ]
        self._metrics.write_events(events, async_enable=False)

    def steps(self) -> dict[tuple[str, str], set[int]]:
        """The steps that are there, by title and series."""
        steps: dict[tuple[str, str], set[int]] = {}
        for event in self._events():
            if event.get("type") == _SCALAR and event.get("task") == self._id:
                steps.setdefault((event["metric"], event["variant"]), set()).add(int(event["iter"]))
        return steps

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in self._path.read_text(encoding="utf-8").splitlines() if is_file(self._path) else ():
            try:
                yield from json.loads(line)
            except ValueError:  # the process was killed while it wrote
                log.warning("%s has a line that ends early: it is not counted", self._path)


def _init_without_signals(**settings: Any) -> Task:
    """``Task.init``, but signals stay as they are.

    ClearML would have SIGTERM do nothing where nobody else looks after it, so that a scheduler could not end the process,
    and take what tells of a crash away. In a thread Python lets nobody set a handler.
    """
    from clearml import Task

    def init() -> Task:
        task = Task.init(**settings)
        Task._remove_signal_hooks()  # noqa: SLF001  nor put handlers back later, that were never away
        return task

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(init).result()


def _online_steps(task: Task) -> Mapping[tuple[str, str], Iterable[int]]:
    reported = task.get_all_reported_scalars()
    return {
        (title, name): [int(x) for x in points["x"]]
        for title, series in reported.items()
        for name, points in series.items()
    }


def _title_and_series(key: str) -> tuple[str, str]:
    """ClearML draws the series of one title into one plot: ``train/loss`` into ``train``."""
    title, slash, series = key.rpartition("/")
    return (title, series) if slash and title and series else (key, key)
