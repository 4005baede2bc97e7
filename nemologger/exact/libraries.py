"""Loaders and datasets of libraries: which one it is, and what it does in another way than torch's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.utils.data import SequentialSampler


def comes_from(value: object, module: str, name: str) -> bool:
    """Whether ``value`` is of the class ``name`` of ``module``, or of a module below; nothing is imported for that."""
    return _is_kind(type(value), module, name)


def _is_kind(kind: type, module: str, name: str) -> bool:
    return kind.__name__ == name and kind.__module__.startswith(module)


def is_of_torchdata(loader: object) -> bool:
    """Whether ``loader`` is torchdata's own DataLoader with state, no subclass of it."""
    return comes_from(loader, "torchdata.stateful_dataloader", "StatefulDataLoader")


def is_of_nodes(loader: object) -> bool:
    """Whether ``loader`` is that of ``torchdata.nodes``."""
    return comes_from(loader, "torchdata.nodes", "Loader")


def is_of_litdata(loader: object) -> bool:
    """Whether ``loader`` is litdata's."""
    return any(_is_kind(kind, "litdata.streaming.dataloader", "StreamingDataLoader") for kind in type(loader).__mro__)


def is_of_mosaic(loader: object) -> bool:
    """Whether ``loader`` is that of MosaicML's ``streaming``, which counts epochs in shared memory."""
    return any(_is_kind(kind, "streaming.base.dataloader", "StreamingDataLoader") for kind in type(loader).__mro__)


# --- torchdata's nodes ------------------------------------------------------------------------------------------------


def iterate_nodes(loader: Any) -> Iterator[Any]:
    """``iter(loader)`` for that of ``torchdata.nodes``.

    It would take a batch at once to see whether there is one, with the generators as they were when the epoch began.
    """
    restarts, loader.restart_on_stop_iteration = loader.restart_on_stop_iteration, False
    try:
        return iter(loader)
    finally:
        loader.restart_on_stop_iteration = restarts


def nodes_ahead(loader: Any) -> bool:
    """Whether nodes of that of ``torchdata.nodes`` take samples in threads or processes of their own."""
    return any(
        kind == "Prefetcher" or (kind == "ParallelMapper" and own.get("num_workers")) for kind, own in _nodes(loader)
    )


def mixes_shuffled_nodes(loader: Any) -> bool:
    """Whether a node of that of ``torchdata.nodes`` begins others anew within an epoch whose samplers change their order."""
    mixed = [own["source_nodes"].values() for kind, own in _nodes(loader) if kind == "MultiNodeWeightedSampler"]
    parts = [own for some in mixed for one in some for kind, own in _nodes(one) if kind == "SamplerWrapper"]
    return any(type(own["sampler"]) not in (SequentialSampler, range, list, tuple) for own in parts)


def _nodes(root: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """``root``, of ``torchdata.nodes``, and the nodes below: the name of the class, and attributes."""
    waiting, seen = [root], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not type(part).__module__.startswith("torchdata.nodes"):
            continue
        seen.add(id(part))
        own = vars(part)
        yield type(part).__name__, own
        for value in own.values():
            waiting += value.values() if isinstance(value, dict) else [value]


# --- Hugging Face's datasets ------------------------------------------------------------------------------------------


def is_of_hugging_face(dataset: object) -> bool:
    """Whether ``dataset`` is a stream of Hugging Face's ``datasets``.

    What it is given by ``load_state_dict()`` it begins every later epoch with, not the next one alone, and ignores if it
    is of another epoch than the number that ``set_epoch()`` was called with.
    """
    return any(_is_kind(kind, "datasets.iterable_dataset", "IterableDataset") for kind in type(dataset).__mro__)


def forget_state(dataset: Any) -> None:
    """Let a stream of Hugging Face begin with its first sample again."""
    dataset.load_state_dict({"epoch": None})  # no epoch has this number


def epoch_of(dataset: Any) -> Any:
    """What holds the number of the epoch of a stream of Hugging Face, which its state does not bring back; or None."""
    epoch = vars(dataset).get("_epoch") if is_of_hugging_face(dataset) else None
    return None if epoch is None else SimpleNamespace(epoch=epoch)


def has_shuffle_buffer(dataset: Any) -> bool:
    """Whether a stream of Hugging Face shuffles in a buffer, which is not in its state."""
    return any("BufferShuffled" in kind for kind, _, _ in _parts(dataset))


def applies_ahead(dataset: Any) -> bool:
    """Whether a stream of Hugging Face calls functions for more than the next sample: by batches, or in threads."""
    return any(
        ("Mapped" in kind or "Filtered" in kind) and (in_threads or own.get("batched"))
        for kind, own, in_threads in _parts(dataset)
    )


def _parts(dataset: Any) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Those of a stream of Hugging Face: the name of the class, attributes, whether threads take samples of it."""
    waiting = [(vars(dataset).get("_ex_iterable"), False)] if is_of_hugging_face(dataset) else []
    while waiting:
        part, in_threads = waiting.pop()
        kind, own = type(part).__name__, getattr(part, "__dict__", {})
        yield kind, own, in_threads
        in_threads = in_threads or "Cycling" in kind
        inner = [own[name] for name in ("ex_iterable",) if name in own] + list(own.get("ex_iterables", ()))
        waiting += [(one, in_threads) for one in inner]
