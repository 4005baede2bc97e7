"""What tells one dataset from another: a run must not go on with another one unnoticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Subset

from nemologger.exact.values import contents

_FEW = 32


def described(dataset: Any) -> dict[str, Any]:
    """The number of samples, for a part of another dataset a checksum of which ones, and one of what is in memory."""
    try:
        samples = len(dataset)
    except (TypeError, NotImplementedError):
        samples = None
    chosen = None
    if isinstance(dataset, Subset):
        chosen = xxhash.xxh3_64_hexdigest(_numbers(dataset.indices))
    return {"samples": samples, "chosen": chosen, "content": _content(dataset)}


def _content(dataset: Any) -> str:
    """A checksum of the tensors and arrays that ``dataset``, or the one it is a part of, keeps."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    found = []
    for name, value in sorted(getattr(dataset, "__dict__", {}).items(), key=lambda pair: str(pair[0])):
        parts = value if issubclass(type(value), list | tuple) and contents.length(value) <= _FEW else [value]
        found += [(name, contents.fingerprint(part)) for part in parts if contents.is_in_memory(part)]
    return xxhash.xxh3_64_hexdigest(repr(found).encode()) if found else ""


def _numbers(indices: Any) -> Any:
    """``indices`` as an array, whatever they are kept in."""
    if isinstance(indices, torch.Tensor):
        indices = indices.cpu()
    elif not isinstance(indices, list | tuple | range | np.ndarray):
        indices = list(indices)
    return np.ascontiguousarray(indices, dtype=np.int64)
