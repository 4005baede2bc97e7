"""Capture the arguments of objects, write them beside a checkpoint, and make the objects again from there."""

from __future__ import annotations

from nemologger.context.artifacts import DirArtifact, FileArtifact
from nemologger.context.capture import reinit, track_io
from nemologger.context.hparams import config_of
from nemologger.context.io_json import load_context
from nemologger.context.mixin import IOMixin
from nemologger.context.trainer_context import TrainerContext
from nemologger.context.uncaptured import Uncaptured

load = load_context

__all__ = [
    "DirArtifact",
    "FileArtifact",
    "IOMixin",
    "TrainerContext",
    "Uncaptured",
    "config_of",
    "load",
    "load_context",
    "reinit",
    "track_io",
]
