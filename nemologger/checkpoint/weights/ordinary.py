"""``weights/`` read as torch's distributed checkpoint does, but without running code of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.futures import Future

from nemologger import names
from nemologger.checkpoint.weights.metadata_file import check_parts, read_metadata
from nemologger.checkpoint.weights.reading import is_local, reading
from nemologger.errors import DamagedCheckpointError, RefusedError


def read_ordinary(weights: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors`` from ``weights`` as torch's distributed checkpoint does.

    Raises:
        RefusedError: If reading would run code.
        DamagedCheckpointError: If something is missing or cannot be read.
    """
    _check_chunks(weights, tensors)
    with reading(weights), warnings.catch_warnings():
        # A hint that one process reads all of it; every rank does.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, storage_reader=_Reader(weights), no_dist=True)


def _check_chunks(weights: Path, keys: Collection[str]) -> None:
    """DCP leaves what no chunk holds as it is: memory that nobody has written."""
    path = weights / names.DCP_METADATA
    metadata = read_metadata(weights)
    stored = metadata.state_dict_metadata
    with reading(path):
        for key in keys:
            entry = stored[key]
            if not isinstance(entry, TensorStorageMetadata):
                continue
            # What is named twice counts once.
            parts = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
            check_parts(path, key, parts)
            there = sum(
                math.prod(sizes)
                for offsets, sizes in parts
                if all(0 <= at <= at + n <= end for at, n, end in zip(offsets, sizes, entry.size, strict=True))
            )
            if there < math.prod(entry.size):
                raise DamagedCheckpointError(
                    f"{path}: of {key}, {there} of {math.prod(entry.size)} elements are in the files"
                )


class _Files(FileSystem):
    """DCP's way to files, for paths that may be of a store."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        if not is_local(suffix):
            raise RefusedError(f"{path / names.DCP_METADATA} names a file outside of {path}, {suffix}: it was not read")
        return path / suffix


class _Reader(FileSystemReader):
    """DCP's reader, for files from strangers."""

    def __init__(self, weights: Path) -> None:
        super().__init__(str(weights))
        self.fs, self.path = _Files(), weights

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception:
            for item in plan.items:  # once more, one by one, to say which it is
                with reading(f"{self.path}, entry {item.dest_index.fqn}"):
                    super().read_data(replace(plan, items=[item]), planner)
            raise

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        read = read_metadata(cast(Path, self.path))
        read.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return read
