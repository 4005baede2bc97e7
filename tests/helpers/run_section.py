"""Train by a section, in a process of its own: ``run_section.py CONFIG.yaml``, or ``run_section.py RECIPE.py``.

Several files train one after the other; one that is followed by ``@DIRECTORY``, there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from omegaconf import OmegaConf
from toy import ToyDataModule, ToyModel

from nemologger import Trainer
from nemologger.exp_manager import exp_manager

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def by_call(config: Path, **settings):
    """As people who come from NeMo 1 do; returns the trainer and the run directory."""
    cfg = OmegaConf.load(config)
    trainer = Trainer(**{**OmegaConf.to_container(cfg.trainer), **QUIET, **settings})
    log_dir = exp_manager(trainer, cfg.exp_manager)
    trainer.fit(ToyModel(), datamodule=ToyDataModule())
    return trainer, log_dir


def module_of(recipe: Path):
    """A file that a section was migrated to, imported."""
    spec = importlib.util.spec_from_file_location(f"migrated_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_recipe(recipe: Path, **settings) -> None:
    """As people do who have migrated."""
    module_of(recipe).run(ToyModel(), ToyDataModule(), **QUIET, **settings)


if __name__ == "__main__":
    here = Path.cwd()
    for argument in sys.argv[1:]:
        file, _, directory = argument.partition("@")
        os.chdir(here / directory)
        by_recipe(here / file) if file.endswith(".py") else by_call(here / file)
