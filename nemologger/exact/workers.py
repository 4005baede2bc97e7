"""What happens in the worker processes of a loader, for each batch, by what torch and torchdata keep to themselves there."""

# ruff: noqa: SLF001

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import fetch


class Watch(Protocol):
    """Looks on in a worker."""

    def before(self, fetcher: Any, seed: int) -> None:
        """A batch is about to be loaded."""

    def after(self) -> bool:
        """It has been; whether to load it again."""


class Numbered(NamedTuple):
    """The index or indices of one batch, and what the workers' generators are to start from for it."""

    seed: int
    number: int
    index: Any


class SeededWorkers:
    """A ``worker_init_fn`` that lets a worker seed its generators for every :class:`Numbered` batch anew.

    What a worker draws for a batch then depends on the batch alone: not on which worker loads it, nor on those before.

    Args:
        inner: The loader's own function.
        late: Let an iterable dataset begin with its first batch, when the generators are seeded.
        watch: What else is to happen for each batch.

    Attributes:
        anew: Seed the first batch of each worker as the first one of the epoch: its dataset may draw an order then.
        ended: The workers whose dataset has given its last sample. torchdata asks it for a batch all the same, and one whose
            state is that of the next pass by then would give the first of that.
    """

    def __init__(self, inner: Callable[[int], None] | None, *, late: bool, watch: Watch | None) -> None:
        self.inner = inner
        self.late = late
        self.watch = watch
        self.anew = False
        self.ended: tuple[int, ...] = ()

    def __call__(self, worker: int) -> None:
        """Prepare worker number ``worker``. It is a process of its own: what changes here changes there only."""
        if get_worker_info() is not None:
            first = worker if self.anew else None
            _let_fetch_seed(fetch._MapDatasetFetcher, self.watch, first)
            _let_fetch_seed(fetch._IterableDatasetFetcher, self.watch, first)
            if self.late:
                _let_begin_late(fetch._IterableDatasetFetcher)
            if worker in self.ended:
                _let_end_at_once(fetch._IterableDatasetFetcher)
        if self.inner is not None:
            self.inner(worker)


def seed_workers(loader: DataLoader[Any], *, late: bool, watch: Watch | None = None) -> None:
    """Make the workers of ``loader`` :class:`SeededWorkers`.

    Those that stay, and that somebody has begun by looking at a batch before training, would take a :class:`Numbered` index
    for three samples: they end.
    """
    if not isinstance(loader.worker_init_fn, SeededWorkers):
        end_workers(loader)
        loader.worker_init_fn = SeededWorkers(loader.worker_init_fn, late=late, watch=watch)


def end_workers(loader: DataLoader[Any]) -> None:
    """Stop the workers of ``loader``, if it has any."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _let_fetch_seed(kind: Any, watch: Watch | None, first: int | None) -> None:
    plain, instead = kind.fetch, [first]
    if getattr(plain, "seeds", False):  # this worker was forked from one
        return

    def seeded(self: Any, index: Any) -> Any:
        if type(index) is not Numbered:
            return plain(self, index)
        number, instead[0] = instead[0], None
        seed = _mixed(index.seed, index.number if number is None else number)
        if watch is not None:
            watch.before(self, seed)
        _seed(seed)
        batch = plain(self, index.index)
        if watch is not None and watch.after():
            watch.before(self, seed)
            _seed(seed)
            batch = plain(self, index.index)
            watch.after()
        return batch

    seeded.seeds = True  # type: ignore[attr-defined]
    kind.fetch = seeded


class _Late:
    """An iterator that is made when it is first asked."""

    def __init__(self, iterable: Any) -> None:
        self._iterable = iterable
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> _Late:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._iterable)
        return next(self._iterator)


def _let_begin_late(kind: Any) -> None:
    def begin(self: Any, dataset: Any, *settings: Any) -> None:
        super(kind, self).__init__(dataset, *settings)
        self.dataset_iter = _Late(dataset)
        self.ended = False

    kind.__init__ = begin


def _let_end_at_once(kind: Any) -> None:
    plain = kind.fetch
    first = [True]

    def end(self: Any, index: Any) -> Any:
        if not first:
            return plain(self, index)
        first.clear()
        keeps = all(callable(getattr(self.dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        before = deepcopy(self.dataset.state_dict()) if keeps else None
        batch = plain(self, index)  # raises where it is at the end of the pass that is over, and notices that
        if not keeps:
            return batch
        self.dataset.load_state_dict(before)  # it is at the beginning of the next one
        raise StopIteration

    end.seeds = True  # type: ignore[attr-defined]
    kind.fetch = end


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def _mixed(seed: int, number: int) -> int:
    """Another seed for each number: the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    value = (seed + (number + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1


@contextmanager
def ended_workers(loader: Any, state: dict[str, Any] | None) -> Iterator[None]:
    """While torchdata's ``loader`` makes workers from ``state``: those that were at the end of their data stay there."""
    snapshots = ((state or {}).get("_snapshot") or {}).get("_worker_snapshots") or {}
    fetchers = {name: (worker or {}).get("fetcher_state") or {} for name, worker in snapshots.items()}
    init = getattr(loader, "worker_init_fn", None)
    if isinstance(init, SeededWorkers):
        ended = [name for name, fetcher in fetchers.items() if fetcher.get("fetcher_ended")]
        init.ended = tuple(int(name.rpartition("_")[2]) for name in ended)
    try:
        yield
    finally:
        if isinstance(init, SeededWorkers):
            init.ended = ()
