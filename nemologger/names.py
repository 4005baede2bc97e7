"""Names on disk: what a file or directory of a run is called. The one place that spells them."""

from __future__ import annotations

from pathlib import Path

EXPERIMENTS = "nemo_experiments"
CHECKPOINTS = "checkpoints"

# Inside a checkpoint.
WEIGHTS = "weights"
EMA_WEIGHTS = "ema_weights"
CONTEXT = "context"
MANIFEST = "manifest.json"
COMMON = "common.pt"
BACKEND = "metadata.json"
DCP_METADATA = ".metadata"

# Inside a context.
IO_JSON = "io.json"

# Suffixes of a checkpoint's own name, as NeMo has them.
LAST = "-last"
END = "-end"
UNFINISHED = "-unfinished"
# Ours: the earlier checkpoint of the same name, set aside until its successor is published.
REPLACED = "-replaced"


def shard(rank: int, index: int) -> str:
    """Name of the ``index``-th weights file of ``rank``, as Megatron and torch's DCP call it."""
    return f"__{rank}_{index}.distcp"


def marker(checkpoint: Path) -> Path:
    """The file beside ``checkpoint`` that says it is being written or removed."""
    return checkpoint.with_name(checkpoint.name + UNFINISHED)
