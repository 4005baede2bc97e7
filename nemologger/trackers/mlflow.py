"""MLflow: one run for all lives of a run, in a database in the run directory or on a server."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger as LightningMLFlowLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from nemologger import lightning_port
from nemologger.disk.there import is_file
from nemologger.trackers.outbox import PATIENCE
from nemologger.trackers.tracker import KeptId, Logged, Tracker, Uploaded, environment, require

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

_URI = "MLFLOW_TRACKING_URI"
_DATABASE = "mlflow.db"
_REFUSED = "INVALID_PARAMETER_VALUE"
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_/. -]+")
_LONGEST_VALUE = 250  # what Lightning cuts parameters to


class MLFlowLogger(Tracker, LightningMLFlowLogger):
    """Lightning's MLFlowLogger, with a store of its own and one MLflow run for all lives of a run.

    The MLflow run's id is in ``mlflow_id.txt`` of the run directory; a resumed run goes on with it. MLflow can neither
    remove nor replace a value that was logged: steps that the earlier life logged after its last checkpoint are not logged
    again. Its parameters cannot change either: those that did are named in a warning. A run that starts again at step 0
    in a used directory is a new MLflow run.

    Args:
        experiment_name: The MLflow experiment; None for the name of this package's experiment.
        run_name: Name of the MLflow run; default: MLflow makes one up.
        tracking_uri: The server or database. Default: the environment variable ``MLFLOW_TRACKING_URI``, else the SQLite
            file ``mlflow.db`` in ``save_dir``.
        tags: Of the MLflow run.
        save_dir: Directory of ``mlflow.db`` and ``artifacts/``, below the run directory if it is relative.
        log_model: Also log checkpoints as artifacts: ``True`` the kept ones at the end, ``"all"`` each one when it is saved.
        prefix: Put before the names of metrics, with a hyphen.
        artifact_location: Where artifacts go; default: ``save_dir``, or what the server of ``tracking_uri`` chooses.
        run_id: An MLflow run to go on with, instead of the kept one.
        synchronous: Whether each call waits until the store has it; MLflow's default is to wait. With False, a killed
            process loses what it logged after its last checkpoint.

    Raises:
        ConfigurationError: MLflow is not installed.

    Example:
        >>> logger = MLFlowLogger(experiment_name="demo")
        >>> logger.is_open  # the database is made when a run uses it
        False
    """

    def __init__(
        self,
        *,
        experiment_name: str | None = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | Path | None = "./mlruns",
        log_model: Literal[True, False, "all"] = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require("mlflow", "mlflow", "MLFlowLogger")
        self._made = False
        self._experiment_given, self._title, self._labels = experiment_name, run_name, tags
        self._uri, self._where, self._artifacts = tracking_uri or os.environ.get(_URI), save_dir, artifact_location
        self._checkpoints_wanted, self._name_prefix, self._synchronous = log_model, prefix, synchronous
        self._given_id = run_id
        self._is_kept, self._ended_as = False, "KILLED"
        self._uploaded = Uploaded("MLFlowLogger")
        self._callback: ModelCheckpoint | None = None
        self._refused: set[str] = set()

    apart_by = ", or give one of them another experiment_name=..."

    @property
    def place(self) -> str:
        """Its run in MLflow."""
        store = self._store if self._uri else self._directory / _DATABASE
        run = f"run {self._given_id}" if self._given_id else f"the run of experiment {self._experiment_title}"
        return f"{run}, MLflow store {store}"

    @property
    def is_open(self) -> bool:
        """See :class:`Tracker`."""
        return self._made

    @property
    def save_dir(self) -> str | None:
        """The directory of the database; None if a ``tracking_uri`` was given."""
        return None if self._uri else str(self._directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client. Opens the run."""
        if not self._made:
            self._make(self._given_id or self._kept_id().read())
        with environment(_URI):  # MLflow's would lead the next run into this one's store
            return super().experiment

    @property
    def run_id(self) -> str | None:
        """The MLflow run, on rank 0. Opens it."""
        _ = self.experiment
        return super().run_id if self._made else None

    @property
    def experiment_id(self) -> str | None:
        """The MLflow experiment, on rank 0. Opens the run."""
        _ = self.experiment
        return super().experiment_id if self._made else None

    def _log(self, metrics: dict[str, Any], step: int | None) -> None:
        rest = self._rest(metrics, step or 0)
        try:
            self._log_accepted(rest, lambda some: LightningMLFlowLogger.log_metrics(self, some, step), self._refused)
        except Exception:
            self._logged = Logged(self._steps_of)  # it may have arrived all the same: not twice
            raise

    def _go_on(self, step: int | None) -> None:
        """Leave out from now on what is logged already."""
        if self._is_kept:
            self._logged = Logged(self._steps_of)

    def _start_over(self) -> None:
        """Begin another MLflow run, if the opened one has an earlier life's steps."""
        client = self.experiment
        if self._is_kept and self._given_id is None and client.get_run(self.run_id).data.metrics:
            earlier = self.run_id
            client.set_terminated(earlier, self._ended_as)
            self._make(None)
            log.warning(
                "training starts at step 0: MLflow run %s begins, and %s is left as it is", self.run_id, earlier
            )

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log checkpoints as artifacts, now or at the end, and have metrics that wait out of this process."""
        super().after_save_checkpoint(checkpoint_callback)
        if self._checkpoints_wanted is True:
            self._callback = checkpoint_callback

    @property
    def _uploads(self) -> bool:  # type: ignore[override]
        return self._checkpoints_wanted == "all"

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Log checkpoints, if that is wanted at the end, and say how the run has ended."""
        callback = self._callback
        if self._made and callback is not None:
            patience = float("inf") if status == "success" else 3 * PATIENCE
            self._outbox.put("checkpoints", lambda: self._upload(callback), patience=patience)
        super().finalize(status)

    def _end(self, status: str) -> None:
        self._flush()
        LightningMLFlowLogger.finalize(self, status)

    # --- the run ------------------------------------------------------------------------------------------------------

    @property
    def _experiment_title(self) -> str:
        return self._experiment_given or (self._run and self._run.name) or "lightning_logs"

    @property
    def _directory(self) -> Path:
        return self._below(self._where or "mlruns")

    @property
    def _store(self) -> str:
        """The store, without a password."""
        store = self._uri or "here"
        address = urlsplit(store)
        if address.password or address.username:
            store = store.replace(f"{address.netloc.rpartition('@')[0]}@", "")
        return store

    def _kept_id(self) -> KeptId:
        return self._kept("mlflow", f"{self._store} {self._experiment_title}".replace("\n", " "))

    def _make(self, run_id: str | None) -> None:
        """Open the MLflow run ``run_id``, or a new one."""
        from mlflow.tracking import MlflowClient

        uri, artifacts = self._uri, self._artifacts
        if uri is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{self._directory / _DATABASE}"
            artifacts = artifacts or (self._directory / "artifacts").as_uri()
        if run_id is not None and run_id != self._given_id and _run_in(MlflowClient(uri), run_id) is None:
            log.warning("MLflow run %s, which this run logged to, is gone: a new one begins", run_id)
            run_id = None
        LightningMLFlowLogger.__init__(
            self,
            experiment_name=self._experiment_title,
            run_name=self._title,
            tracking_uri=uri,
            tags=dict(self._labels or {}),
            save_dir=str(self._directory),
            prefix=self._name_prefix,
            artifact_location=artifacts,
            run_id=run_id,
            synchronous=self._synchronous,
        )
        with environment(_URI):
            client = super().experiment
        self._made, self._is_kept = True, run_id is not None
        if run_id is not None:
            status = client.get_run(run_id).info.status
            self._ended_as = "KILLED" if status == "RUNNING" else status
            client.update_run(run_id, status="RUNNING")
        self._kept_id().write(str(self.run_id))

    # --- what is in it ------------------------------------------------------------------------------------------------

    def _name_of(self, key: str) -> str:
        return _NOT_IN_A_NAME.sub("", f"{self._name_prefix}-{key}" if self._name_prefix else key)

    def _steps_of(self, name: str) -> Iterable[int]:
        return [metric.step for metric in self.experiment.get_metric_history(str(self.run_id), name)]

    def _write_params(self, params: dict[str, Any]) -> None:
        given = {key: str(value)[:_LONGEST_VALUE] for key, value in lightning_port.flat_params(params).items()}
        known = self.experiment.get_run(str(self.run_id)).data.params if self._is_kept else {}
        changed = {key: (known[key], value) for key, value in given.items() if known.get(key, value) != value}
        if changed:
            changes = ", ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
            log.warning("MLflow run %s keeps the parameters that it has: %s", self.run_id, changes)
        new = {key: value for key, value in given.items() if key not in known}
        self._log_accepted(new, lambda some: LightningMLFlowLogger.log_hyperparams(self, some), set())

    def _log_accepted(
        self, given: Mapping[str, Any], log_them: Callable[[dict[str, Any]], object], refused: set[str]
    ) -> None:
        """Log what MLflow accepts of ``given``: for one name that it does not, it refuses all.

        Args:
            given: Values by name.
            log_them: Logs some of them.
            refused: Names that are left out; those that it refuses now join them, and are named in a warning.
        """
        from mlflow.exceptions import MlflowException

        some = {name: value for name, value in given.items() if name not in refused}
        if not some:
            return
        try:
            log_them(some)
        except MlflowException as error:
            if error.error_code != _REFUSED:
                raise
            if len(some) > 1:
                for name, value in some.items():
                    self._log_accepted({name: value}, log_them, refused)
                return
            refused.update(some)
            log.warning(
                "MLflow refuses %s, which is left out from now on: %s", ", ".join(map(repr, some)), error.message
            )

    def _flush(self) -> None:
        if self._synchronous is False:
            import mlflow

            mlflow.flush_async_logging()

    def _upload(self, callback: ModelCheckpoint) -> None:
        for path in self._uploaded.new(callback):
            log_to = "checkpoints" if is_file(path) else f"checkpoints/{path.name}"
            log_it = self.experiment.log_artifact if is_file(path) else self.experiment.log_artifacts
            log_it(str(self.run_id), str(path), log_to)
            self._uploaded.add(path)


def _run_in(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None
