"""Two runs in one process, by sections that ask for checkpoints to be uploaded: ``uploads.py DIRECTORY STORE``.

Prints as JSON what W&B and MLflow were given. The second run saves to STORE.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers.sections import OFF, bare_trainer, fit
from nemologger.exp_manager import exp_manager
from nemologger.trackers.wandb_file import _records

ROOT = Path(sys.argv[1])


def section(version: str, log_model: object, **params: object) -> Path:
    trainer = bare_trainer(max_steps=4, val_check_interval=2, log_every_n_steps=1)
    config = {
        **OFF,
        "exp_dir": str(ROOT),
        "name": "n",
        "version": version,
        "create_wandb_logger": True,
        "wandb_logger_kwargs": {"project": "p", "name": "x", "log_model": log_model},
        "create_mlflow_logger": True,
        "mlflow_logger_kwargs": {"log_model": True},
        "checkpoint_callback_params": {
            "every_n_train_steps": 2,
            "every_n_epochs": None,
            "save_top_k": 1,
            "filename": "{step}",
            "save_nemo_on_train_end": False,
            **params,
        },
    }
    run = exp_manager(trainer, config)
    fit(trainer)
    return run


def artifacts(run: Path) -> list[dict]:
    """What is in the run's W&B files."""
    from wandb.proto import wandb_internal_pb2

    run_id = (run / "wandb_id.txt").read_text().strip()
    (file,) = ROOT.rglob(f"run-{run_id}.wandb")
    found = []
    for data in _records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "artifact":
            one = record.artifact
            entries = one.manifest.contents
            copied = all(Path(e.local_path).stat().st_size == e.size > 0 for e in entries)
            from_checkpoint = json.loads(one.metadata)["original_filename"]
            found.append(
                {
                    "checkpoint": from_checkpoint,
                    "name": one.name.replace(run_id, "ID"),
                    "aliases": sorted(one.aliases),
                    "files": sorted(e.path for e in entries),
                    "copied": copied,
                }
            )
    return found


def main() -> None:
    first = section("a", "all")
    files = sorted(p.relative_to(c).as_posix() for c in first.glob("checkpoints/step=2") for p in c.rglob("*.*"))
    second = section("b", True)
    third = section("c", "all", dirpath=sys.argv[2])
    import wandb

    wandb.finish()
    print(
        json.dumps(
            {
                "files": files,
                "wandb": [artifacts(run) for run in (first, second, third)],
                "mlflow": [
                    sorted({p.parent.name for p in (run / "mlruns" / "artifacts").rglob("manifest.json")})
                    for run in (first, second, third)
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
