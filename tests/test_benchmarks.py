"""The benchmark of scale goes through the functions that a run uses, and breaks unnoticed when they change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_figures_of_a_few_ranks(tmp_path):
    command = [sys.executable, _BENCHMARKS / "scale.py", "--ranks", "3", "8", "--tensors", "2"]
    subprocess.run(
        [*command, "--json", tmp_path / "scale.json"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    few, more = json.loads((tmp_path / "scale.json").read_text())
    assert few.keys() == more.keys()
    assert few["files to read, of one rank"] == more["files to read, of one rank"] == 2
    assert few["metadata, MB"] < more["metadata, MB"]
