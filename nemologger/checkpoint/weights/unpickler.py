"""What a ``.metadata`` may name. Reading one runs no code of the file."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan

from nemologger.errors import RefusedError


class MetadataUnpickler(pickle.Unpickler):
    """Admits the classes that DCP and Megatron put into ``.metadata``, and nothing else."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What ``module`` and ``name`` stand for.

        Raises:
            RefusedError: They are not admitted.
        """
        allowed = _ADMITTED.get((module, name))
        if allowed is not None:
            return allowed
        dtype = vars(torch).get(name)  # not getattr: torch imports parts of itself when they are asked for
        if module == "torch" and isinstance(dtype, torch.dtype):
            return dtype
        raise RefusedError(f"{self._path} names {module}.{name}, which no checkpoint needs: it was not loaded")


@dataclass(frozen=True)
class _MegatronPlan(SavePlan):
    """Stands in for the one class of Megatron-core that its ``.metadata`` names."""

    mcore_data: dict[str, Any] | None = None


class _Properties(TensorProperties):
    """Takes what DCP of torch 2.15 writes, too: strides are a sixth value, which nothing reads."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__class__ = TensorProperties  # type: ignore[assignment]  # which is what is written again
        self.__setstate__(state[:5])


# A pickle can set attributes of what it names. So where it may name something that all the program uses, it gets a
# function of ours instead, or a class that is put right afterwards.


def _path(*parts: str) -> Path:
    return Path(*parts)


def _layout(name: str) -> Any:
    return cast(Any, torch.serialization)._get_layout(name)


def _member(kind: Any, name: Any) -> Enum:
    """A member of an enum, which Python before 3.11.4 pickles as its attribute."""
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise RefusedError(f"builtins.getattr of a {type(kind).__name__}: no checkpoint needs that, it was not loaded")
    return cast(Enum, kind.__members__[name])


_ADMITTED: dict[tuple[str, str], Any] = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (dcp_metadata.__name__, "TensorProperties"): _Properties,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        (dcp_planner.__name__, name): getattr(dcp_planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _MegatronPlan,
    ("builtins", "getattr"): _member,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")  # Python 3.13 has it there
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}

#: The classes that it may name.
CLASSES = [TensorProperties, *(kind for kind in _ADMITTED.values() if isinstance(kind, type))]
