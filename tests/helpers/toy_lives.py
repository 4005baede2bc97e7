"""Lives of a run ``toy``, and what the next one of it would go on from."""

from __future__ import annotations

from pathlib import Path

from toy import ToyModel, loader, quiet_trainer

from nemologger import AutoResume, ModelCheckpoint, NeMoLogger


def live(root: Path, steps: int, model: ToyModel | None = None, resume: AutoResume | None = None, **checkpoint):
    """One life of the run ``root/toy``."""
    trainer = quiet_trainer(max_steps=steps)
    settings = {"filename": "{step}", "every_n_train_steps": 5, **checkpoint}
    log = NeMoLogger(name="toy", log_dir=root, ckpt=ModelCheckpoint(**settings))
    log.setup(trainer, resume_if_exists=True)
    model = model or ToyModel()
    resume = resume or AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
    found = resume.setup(trainer, model)
    trainer.fit(model, loader(), loader())
    return found, model, trainer


def ten_steps(root: Path) -> Path:
    """The checkpoints of a run of 10 steps that saved every 5."""
    live(root, 10)
    return root / "toy" / "checkpoints"


def found_in(directory: Path, steps: int = 99, **options) -> Path | None:
    return AutoResume(resume_from_directory=directory, **options).setup(quiet_trainer(max_steps=steps)).path
