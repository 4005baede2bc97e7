"""The tests that need GPUs, on simulated ones: see :mod:`simulated_cuda`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from simulated_cuda import building

HERE = Path(__file__).parent
REPEATS = "test_a_resumed_run_repeats_the_one_that_was_not_stopped"

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a torch that was built for the CPU"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return building.build(tmp_path_factory.mktemp("device"))


def on_devices(library: Path, tests: list[str]) -> str:
    environment = {
        **os.environ, building.ENVIRONMENT: str(library), "SIMULATED_CUDA_DEVICES": "2", "SIMULATED_CUDA_DELAY": "5000",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }  # fmt: skip
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-p", "simulated_cuda.patches", "-p", "no:cacheprovider", "-q", *tests]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-9000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_saves_beside_training(library):
    files = ("test_cuda.py", "checkpoint/writing/test_arena.py", "watch/test_own_time.py")
    others = f"not {REPEATS} and not callbacks"  # torch's profilers want its CUDA
    last = on_devices(library, [*(str(HERE / file) for file in files), "-m", "gpu", "-k", others])
    assert last.startswith("20 passed")


def test_resumed_runs(library):
    cases = ("GPU, 16-mixed-1", "GPU-2", "GPU, FSDP2-2")
    last = on_devices(library, [f"{HERE / 'test_cuda.py'}::{REPEATS}[{case}]" for case in cases])
    assert last.startswith("3 passed")
