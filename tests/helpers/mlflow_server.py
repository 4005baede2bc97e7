"""A real MLflow server on loopback."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import environment, free_port, kill, wait_for

#: Its processes for jobs, which nobody here has, take longer to start than it does itself.
_ALONE = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def mlflow_server(directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """One that answers, and its process, which leads a group of its own."""
    for attempt in range(3):
        port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{directory / 'server.db'}"]
        command += ["--artifacts-destination", str(directory / "served")]
        with (directory / "server.log").open("w") as out:
            process = subprocess.Popen(
                command,
                env=environment(_ALONE),
                stdout=out,
                stderr=out,
                text=True,
                cwd=directory,
                start_new_session=True,
            )
        uri = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: process.poll() is not None or answers(uri), timeout=240, every=0.3)  # noqa: B023
            if process.poll() is None:
                yield uri, process
                return
            assert attempt < 2, (directory / "server.log").read_text()[-3000:]  # somebody else has taken the port
        finally:
            kill(process)


def answers(uri: str) -> bool:
    """Whether a server is at ``uri``."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def mlflow_runs(uri: str) -> list[dict]:
    """What is in the experiment "toys" of a server or a database, the newest run first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    toys = [experiment.experiment_id for experiment in client.search_experiments(filter_string="name = 'toys'")]
    return [
        {
            "id": run.info.run_id,
            "status": run.info.status,
            "params": run.data.params,
            "tags": run.data.tags,
            "artifacts": run.info.artifact_uri,
            "metrics": [
                (name, metric.step)
                for name in run.data.metrics
                for metric in client.get_metric_history(run.info.run_id, name)
            ],
        }
        for run in client.search_runs(toys)
    ]
