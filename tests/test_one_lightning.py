"""Libraries that import pytorch_lightning train with this package, once both names stand for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_LIBRARY = """
import torch
import pytorch_lightning as pl
from lightning_fabric.utilities import seed
from pytorch_lightning.callbacks.early_stopping import EarlyStopping
from pytorch_lightning.demos.boring_classes import BoringModel

class Model(BoringModel):
    stops = EarlyStopping("loss", strict=False)
"""
_PROGRAM = """
import sys
import nemologger as nl
nl.use_one_lightning()
nl.use_one_lightning()
import library
import lightning.fabric.utilities.seed, lightning.pytorch as pl
assert library.seed is lightning.fabric.utilities.seed
assert library.pl is pl and pl.__spec__.name == "lightning.pytorch" and pl.__name__ == "lightning.pytorch"
try:
    import pytorch_lightning.not_there
except ModuleNotFoundError as error:
    assert error.name == "lightning.pytorch.not_there", error.name
trainer = nl.Trainer(max_steps=2, callbacks=[library.Model.stops], accelerator="cpu", limit_val_batches=0)
trainer.fit(library.Model())
assert trainer.global_step == 2
"""
_TOO_LATE = """
import pytorch_lightning
import nemologger as nl
nl.use_one_lightning()
"""


def _run(directory: Path, program: str) -> subprocess.CompletedProcess[str]:
    (directory / "library.py").write_text(_LIBRARY)
    (directory / "program.py").write_text(program)
    return subprocess.run([sys.executable, "program.py"], cwd=directory, capture_output=True, text=True, check=False)


def test_a_library_of_the_other_package_trains(tmp_path):
    done = _run(tmp_path, _PROGRAM)
    assert done.returncode == 0, done.stderr


def test_it_comes_before_what_it_is_for(tmp_path):
    done = _run(tmp_path, _TOO_LATE)
    assert "pytorch_lightning has been imported already" in done.stderr
    assert done.returncode == 1
