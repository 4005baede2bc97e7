"""What importing brings along."""

from __future__ import annotations

import json
import subprocess
import sys


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
    modules = "commit find load manifest naming plain retention saver shares snapshot stage verify weights write"
    loaded = loaded_by("\n".join(f"import nemologger.checkpoint.{name}" for name in modules.split()))
    assert "torch" in loaded
    assert not loaded & {"lightning", "pytorch_lightning", "fiddle", "wandb", "omegaconf"}
    above = {name for name in loaded if name.startswith("nemologger.") and ".checkpoint" not in name}
    known = [
        "errors",
        "names",
        "disk",
        "disk.direct_file",
        "disk.local",
        "disk.pages",
        "ranks",
        "ranks.agreement",
        "ranks.group",
        "ranks.poll",
        "ranks.shared_work",
        "ranks.tree",
        "stores",
        "stores.store",
        "stores.path",
        "stores.client",
    ]
    assert above <= {f"nemologger.{name}" for name in known}
