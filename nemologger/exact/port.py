"""What ``torch.utils.data`` and torchdata keep to themselves: only this file and :mod:`workers` read or change it."""

# ruff: noqa: SLF001

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from os import getpid
from threading import get_ident
from typing import Any, Protocol
from weakref import ref as weakref

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter, _InfiniteConstantSampler

from nemologger.exact import libraries
from nemologger.exact.workers import Numbered, SeededWorkers, ended_workers

_ARGUMENTS = (
    "dataset", "batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn",
    "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


class Entered(Protocol):
    """A context that can be entered again and again."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def is_iterator_of_loader(value: object) -> bool:
    """Whether ``value`` is what a DataLoader gives its batches with."""
    return issubclass(type(value), _BaseDataLoaderIter)


# --- what a loader is -------------------------------------------------------------------------------------------------


def loader_within(loader: Any) -> DataLoader[Any] | None:
    """``loader``, or the one DataLoader among the attributes of what is none, or in a list there; None if there are more."""
    if isinstance(loader, DataLoader):
        return loader
    found: dict[int, DataLoader[Any]] = {}
    for value in getattr(loader, "__dict__", {}).values():
        for part in value if type(value) in (list, tuple) else (value,):
            if issubclass(type(part), DataLoader):
                found[id(part)] = part
    return next(iter(found.values())) if len(found) == 1 else None


@contextmanager
def first_index_within(loader: Any, then: Callable[[_BaseDataLoaderIter], None]) -> Iterator[None]:
    """While this lasts, call ``then`` when a DataLoader that ``loader`` goes through has drawn its first index."""
    plain, process, thread = _BaseDataLoaderIter._next_index, getpid(), get_ident()
    own = loader.dataset if isinstance(loader, DataLoader) else None

    def draw(self: _BaseDataLoaderIter) -> Any:
        index = plain(self)  # type: ignore[no-untyped-call]
        # A worker that is started meanwhile has this, too, and may have loaders of its own.
        if self._dataset is not own and (getpid(), get_ident()) == (process, thread):
            _BaseDataLoaderIter._next_index = plain  # type: ignore[method-assign]
            then(self)
        return index

    _BaseDataLoaderIter._next_index = draw  # type: ignore[method-assign]
    try:
        yield
    finally:
        _BaseDataLoaderIter._next_index = plain  # type: ignore[method-assign]


def has_workers(batches: Any) -> bool:
    """Whether a DataLoader, as ``batches`` goes through it, has workers."""
    return bool(batches._num_workers)


def is_map_style(loader: DataLoader[Any]) -> bool:
    """Whether batches are looked up by index."""
    return not isinstance(loader.dataset, IterableDataset)


def draws_only_at_first(sampler: Any) -> bool:
    """Whether ``sampler`` is known to be done with the global generators once its first index is out."""
    known = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
    if type(sampler) is BatchSampler or libraries.comes_from(sampler, "torchdata.stateful_dataloader", "BatchSampler"):
        return draws_only_at_first(sampler.sampler)
    return (
        type(sampler) in (*known, _InfiniteConstantSampler, range, list, tuple)
        or libraries.comes_from(sampler, "torchdata.stateful_dataloader", "RandomSampler")
        or libraries.comes_from(sampler, "lightning.fabric.utilities.distributed", "DistributedSamplerWrapper")
    )


# --- indices ----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """How the next iteration is to go.

    Attributes:
        seed: For the generators of the workers.
        skip: So many batches are left out; only their indices are drawn.
        numbered: Hand the indices out with a seed and a number. The workers must be :class:`SeededWorkers`.
        streams: The sampler draws from these instead of the global generators.
        ready: Called when the batches to skip have been left out, and before the next one is loaded.
        begun: Whether that has happened.
        thread: The one that takes batches.
        elsewhere: Whether the indices were asked for in another one.
        order: Goes through this in the place of the sampler, unless None.
        draw: Draws what is to be left out from an iterator, and more if more had been drawn: what comes first of the rest.
        ahead: What is left of that.
        newest: The last that was handed out, to workers ahead of the batch that is taken: its number, and what it is.
        told: So many of those as may be ahead of training.
        ended: Whether there are no more: a sampler may count epochs at the end of one.
    """

    seed: int
    skip: int
    numbered: bool
    streams: Entered | None
    ready: Callable[[], None]
    begun: bool = False
    thread: int = field(default_factory=get_ident)
    elsewhere: bool = False
    order: Any = None
    draw: Callable[[Iterator[Any]], list[Any]] | None = None
    ahead: list[Any] = field(default_factory=list)
    newest: tuple[int, Any] = (0, None)
    told: deque[Any] = field(default_factory=lambda: deque(maxlen=0))
    ended: bool = False


class Indices:
    """Stands in for the index sampler of a DataLoader. Without a plan it changes nothing.

    What is set on it is set on the sampler.

    Args:
        inner: The sampler, or batch sampler, of the loader.
    """

    def __init__(self, inner: Any) -> None:
        self.inner: Any
        self.plan: Plan | None
        vars(self).update(inner=inner, plan=None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner) if self.plan is None else _planned(self.inner, self.plan)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "plan":
            vars(self)[name] = value
        else:
            setattr(self.inner, name, value)


def _planned(inner: Any, plan: Plan) -> Iterator[Any]:
    streams = plan.streams
    plan.elsewhere = get_ident() != plan.thread
    with streams or nullcontext():
        indices = _from_here(iter(inner if plan.order is None else plan.order))
        plan.ahead = list(islice(indices, plan.skip, plan.skip)) if plan.draw is None else plan.draw(indices)
    if not plan.begun:
        plan.begun = True
        plan.ready()
    if streams is None and not plan.numbered and not plan.ahead:
        yield from indices
        return
    number = plan.skip
    while True:
        try:
            if plan.ahead:
                index = plan.ahead.pop(0)
            elif streams is None:
                index = next(indices)
            else:
                with streams:
                    index = next(indices)
        except StopIteration:
            plan.ended = True
            return
        plan.newest = number, index
        plan.told.append(index)
        yield Numbered(plan.seed, number, index) if plan.numbered else index
        number += 1


def _from_here(iterator: Iterator[Any]) -> Iterator[Any]:
    """``iterator``, of which nobody asks ``iter()`` once more: samplers of lhotse, which are their own, begin anew then."""
    with suppress(StopIteration):
        while True:
            yield next(iterator)


def indices_of(loader: DataLoader[Any]) -> Indices:
    """The :class:`Indices` of ``loader``, put in place if there are none yet."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    current = getattr(loader, name)
    if not isinstance(current, Indices):
        current = Indices(current)
        object.__setattr__(loader, name, current)  # the class forbids it once a loader is made
    return current


def release(loader: DataLoader[Any]) -> None:
    """Undo what :func:`indices_of` and :func:`seed_workers` did."""
    for name in ("sampler", "batch_sampler"):
        current = getattr(loader, name)
        if isinstance(current, Indices):
            object.__setattr__(loader, name, current.inner)
    if isinstance(loader.worker_init_fn, SeededWorkers):
        loader.worker_init_fn = loader.worker_init_fn.inner


# --- iterating --------------------------------------------------------------------------------------------------------


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """``iter(loader)``, which draws as much from the global generators whether or not there are workers already."""
    draw_for_workers(loader)
    return iter(loader)


def draw_for_workers(loader: DataLoader[Any]) -> None:
    """Draw what making workers draws, a seed for them, if ``loader`` has some that stayed: a resumed run has none yet."""
    if loader.num_workers > 0 and loader.persistent_workers and loader._iterator is not None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def iterate_apart(loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of ``loader`` that leave alone an iterator, or workers, that it keeps."""
    kept, loader._iterator = loader._iterator, None
    try:
        batches = iter(loader)
        first = list(islice(batches, 1))  # a subclass may begin only now
    finally:
        loader._iterator = kept
    yield from first
    yield from batches


def kept_iterators(loader: Any) -> dict[str, weakref[Any]]:
    """The iterators that are attributes of ``loader``: for all epochs, as timm's MultiEpochsDataLoader, or the newest."""
    own = getattr(loader, "__dict__", {})
    return {name: weakref(v) for name, v in own.items() if is_iterator_of_loader(v) and name != "_iterator"}


# --- datasets with state ----------------------------------------------------------------------------------------------


def dataset_iterator(batches: Iterator[Any]) -> Any:
    """What ``iter(dataset)`` gave the iterator of a loader without workers, or None."""
    return getattr(getattr(batches, "_dataset_fetcher", None), "dataset_iter", None)


def has_ended(batches: Iterator[Any]) -> bool:
    """Whether the dataset of a loader without workers has no more samples, as the one that fills a batch may find out."""
    return bool(getattr(getattr(batches, "_dataset_fetcher", None), "ended", False))


def with_worker_state(loader: DataLoader[Any]) -> Any:
    """torchdata's DataLoader with the arguments of ``loader``: it brings the state of datasets back from the workers."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    arguments = {name: getattr(loader, name) for name in _ARGUMENTS}
    if libraries.is_of_hugging_face(loader.dataset):
        arguments["persistent_workers"] = False  # they would begin each epoch where the first one was resumed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # by torch, of a call in torchdata
        return StatefulDataLoader(**arguments)


def workers_of(state: Any) -> int:
    """How many workers the ``state`` of a loader over a dataset with state is of."""
    snapshot = state.get("_snapshot") if isinstance(state, dict) else None
    return 0 if snapshot is None else int(snapshot["_main_snapshot"]["_num_workers"])


def bring_to_end(loader: Any, state: dict[str, Any], *, over: bool) -> None:
    """Give torchdata's ``loader`` back workers whose datasets are where they were left in the epoch of ``state``.

    That is their end if it is ``over``: the loader would leave out the pass that ended, and with it that the datasets
    notice. Else they have loaded ahead, of data that may have no end.
    """
    loader.load_state_dict({**state, "_iterator_finished": False})
    with ended_workers(loader, state):
        batches = iter(loader)
        for _ in batches if over else ():
            pass
