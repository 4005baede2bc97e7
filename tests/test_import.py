"""What importing brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nemologger


def loaded_by(statement: str) -> set[str]:
    """The modules that are there after ``statement``, in a fresh interpreter."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_brings_nothing_along():
    loaded = loaded_by("import nemologger")
    assert not loaded & {
        "torch",
        "lightning",
        "fiddle",
        "wandb",
        "tensorboard",
        "yaml",
        "numpy",
        "torchdata",
        "omegaconf",
    }


def test_the_checkpoint_engine_knows_no_lightning():
    root = Path(nemologger.__file__).parent
    modules = [
        ".".join(path.relative_to(root.parent).with_suffix("").parts) for path in root.glob("checkpoint/**/*.py")
    ]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "fiddle", "wandb", "omegaconf"}
    below = {name.split(".")[1] for name in loaded if name.startswith("nemologger.")} - {"checkpoint"}
    assert below <= {"condition", "errors", "names", "disk", "ranks", "signals", "stores"}
