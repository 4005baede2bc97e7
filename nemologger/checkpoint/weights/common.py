"""The two files beside the tensors: ``common.pt`` and ``metadata.json``, as Megatron-core 0.14 writes them.

See its ``core/dist_checkpointing/core.py``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemologger import names
from nemologger.checkpoint.weights.reading import reading
from nemologger.errors import DamagedCheckpointError
from nemologger.stores.path import in_store

BACKEND: bytes = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()


def dump_common(common: Mapping[str, Any]) -> bytes:
    """``common.pt``."""
    buffer = io.BytesIO()
    torch.save(dict(common), buffer)
    return buffer.getvalue()


def read_common(weights: Path) -> dict[str, Any]:
    """What ``common.pt`` holds; nothing of it is run.

    Raises:
        RefusedError: If it holds more than plain types.
        DamagedCheckpointError: If it cannot be read.
    """
    path = weights / names.COMMON
    with reading(path):
        content = path if in_store(path) is None else io.BytesIO(path.read_bytes())
        common: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    if not isinstance(common, dict):
        raise DamagedCheckpointError(f"{path} holds a {type(common).__name__}, not a dictionary")
    return common
