"""The recipe of a sweep, as its docstring says to run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from processes import environment

RECIPE = Path(__file__).parents[1] / "recipes" / "sweep.py"


def test_it_trains_each_combination_and_keeps_its_accuracy():
    arguments = [
        "-m",
        "model.width=16,64",
        "model.learning_rate=1e-2",
        "trainer.max_epochs=1",
        "trainer.accelerator=cpu",
    ]
    done = subprocess.run(
        [sys.executable, str(RECIPE), *arguments],
        env=environment(light=False),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = [f"model.learning_rate=0.01,model.width={width},trainer.accelerator=cpu" for width in (16, 64)]
    runs = Path("nemo_experiments")
    assert sorted(path.name for path in (runs / "digits_sweep").iterdir()) == names
    for name in names:
        record = json.loads((runs / "sweeps" / "sweep" / "sweep" / name / "job.json").read_text())
        assert record["state"] == "finished"
        assert 0.5 < record["value"] <= 1
