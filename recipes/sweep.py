"""Classify handwritten digits as a YAML file says, once, or for every combination of some settings.

python recipes/sweep.py
python recipes/sweep.py model.width=128
python recipes/sweep.py -m model.width=32,128 model.learning_rate=1e-3,1e-2
python recipes/sweep.py -m model.width=32,128 model.learning_rate=1e-3,1e-2 hydra/launcher=joblib hydra.launcher.n_jobs=2
python recipes/sweep.py -m model.width=32,128 model.learning_rate=1e-3,1e-2 trainer.max_epochs=20   # go on from there
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from digits import DigitClassifier, digits

import nemologger as nl

log = logging.getLogger(__name__)


@nl.hydra_runner(config_path="conf", config_name="sweep")
def main(cfg: Any) -> float:
    """Train, or go on training; the accuracy is kept in the sweep's record of this combination."""
    pl.seed_everything(cfg.seed)
    model = DigitClassifier(**cfg.model)
    trainer = nl.Trainer(**cfg.trainer)
    logger = nl.NeMoLogger(
        name=cfg.name,
        log_dir=cfg.dir,
        ckpt=nl.ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=1, save_last="link"),
    )
    resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)

    run = logger.setup(trainer, resume_if_exists=True)
    resume.setup(trainer, model)
    trainer.fit(model, *digits())

    accuracy = float(trainer.checkpoint_callback.best_model_score)
    log.info("%s: best accuracy %.1f%%", run.log_dir, 100 * accuracy)
    return accuracy


if __name__ == "__main__":
    main()
