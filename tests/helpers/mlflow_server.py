"""A real MLflow server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import environment, free_port, kill, wait_for


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
                command, env=environment(), stdout=out, stderr=out, text=True, cwd=directory, start_new_session=True
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
    """What is in the experiment "toys". In a process of its own: MLflow leaves threads and environment variables behind."""
    code = """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(sys.argv[1])
runs = client.search_runs([e.experiment_id for e in client.search_experiments(filter_string="name = 'toys'")])
print(json.dumps([{"id": r.info.run_id, "status": r.info.status, "params": r.data.params, "tags": r.data.tags,
    "artifacts": r.info.artifact_uri, "metrics": [[k, m.step] for k in r.data.metrics
    for m in client.get_metric_history(r.info.run_id, k)]} for r in runs]))
"""
    done = subprocess.run([sys.executable, "-c", code, uri], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
