"""Streams and loaders that say where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from nemologger.exact import libraries, port, workers
from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.loaders.source import AHEAD, Source, has_state, loading
from nemologger.exact.rng import RngState

_MIXED = (
    "the state of its MultiNodeWeightedSampler does not say all of shuffled nodes that have come to their end: a run that "
    "is resumed after one has may take other samples. Shuffle the samples once, in the dataset, and take them in order"
)
_COMBINED = (
    "the state of litdata's loader does not say which dataset each worker takes the next sample of: a resumed run may take "
    "others. Use a StreamingDataset of all samples, or num_workers=0"
)
_APPLIED = (
    "functions of map() and filter() are called ahead of training, by batches or in threads of interleave_datasets(), and "
    "for some samples again by a resumed run: what they draw from torch, numpy.random or random differs then. Draw in a "
    "map() after interleave_datasets() that is not batched, or in the collate_fn"
)


_WITHIN = (
    "a DataLoader begins within it with the first batch of an epoch, or of a resumed run: what its workers draw there is "
    "other than in the run that was stopped. Draw for samples in this process; or leave out state_dict(): the batches of "
    "the epoch are loaded once more then"
)


class Stateful(Source):
    """What may go through a DataLoader of its own, which begins, and draws for that, only with the first batch."""

    _present: RngState | None = None

    @override
    def first(self) -> AbstractContextManager[None]:
        return port.first_index_within(self.loader, self._begun_within)

    def _begun_within(self, batches: Any) -> None:
        if self._present is not None:  # one that was not resumed had begun before
            self._present.restore()
        self._limits += [_WITHIN] * (port.has_workers(batches) and _WITHIN not in self._limits)

    @override
    def after_first(self, batches: Iterator[Any]) -> None:
        self._present = None


class IterableWithState(Stateful):
    """A DataLoader without workers, over an iterable dataset with state of its own."""

    draws = True
    shares = True
    within_epoch = "beside its state"

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._set_back = False
        self._iterator_has_state = False
        self._limits += [_APPLIED] * libraries.applies_ahead(loader.dataset)
        self.in_doubt = not libraries.is_of_hugging_face(loader.dataset)

    @override
    def at_start(self) -> dict[str, Any]:
        return {"generator": self.loader.generator, "epoch": libraries.epoch_of(self.loader.dataset)}

    @override
    def at_batch(self) -> dict[str, Any]:
        return loading(self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        # In the order that torchdata has made the convention: the dataset, then its iterator, then the iterator's state.
        if state is not None and has_state(self.loader.dataset):
            self.loader.dataset.load_state_dict(state["dataset"])
            self._set_back = libraries.is_of_hugging_face(self.loader.dataset)
        elif self._set_back:
            libraries.forget_state(self.loader.dataset)
        batches: Iterator[Any] = iter(self.loader)
        iterator = port.dataset_iterator(batches)
        self._iterator_has_state = iterator is not self.loader.dataset and has_state(iterator)
        if state is not None and state["iterator"] is not None and has_state(iterator):
            iterator.load_state_dict(state["iterator"])
        ready()
        self._present = None if state is None else RngState.capture()
        return batches

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if has_state(self.loader.dataset) and not libraries.is_of_hugging_face(self.loader.dataset):
            self.loader.dataset.load_state_dict(state["dataset"])

    @override
    def has_ended(self, batches: Iterator[Any]) -> bool:
        return port.has_ended(batches)  # its state may be that of the next pass by now

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        own = None
        if batches is not None and self._iterator_has_state:
            own = port.dataset_iterator(batches).state_dict()
        return {"dataset": self.loader.dataset.state_dict(), "iterator": own}


class WithState(Stateful):
    """A loader that has ``state_dict`` and ``load_state_dict`` itself, or torchdata's in its place."""

    draws = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._loader: Any = loader
        self.indices: port.Indices | None = None
        self._ready: Callable[[], None] = lambda: None
        self._has_begun = False
        if isinstance(loader, DataLoader):
            self.shares = libraries.is_of_torchdata(loader) or not has_state(loader)
            stays = libraries.is_of_torchdata(loader) and loader.persistent_workers
            never_ends = stays and libraries.is_of_hugging_face(loader.dataset)
            if never_ends or not has_state(loader):
                self._loader = port.with_worker_state(loader)
            self.draws = loader.num_workers == 0
            if not self.draws:
                self.watch = Watch(loader.num_workers, "collated")
                self.ways = (False, True)
            self._limits += [_APPLIED] * libraries.applies_ahead(loader.dataset)
            combines = libraries.is_of_litdata(loader) and type(loader.dataset).__name__ == "CombinedStreamingDataset"
            self._limits += [_COMBINED] * (combines and not self.draws)
            keeps_all = libraries.is_of_litdata(loader) or libraries.is_of_mosaic(loader)
            self.in_doubt = not (keeps_all or libraries.is_of_hugging_face(loader.dataset))
        else:
            self.in_doubt = not libraries.is_of_nodes(loader)
            self._limits += [AHEAD] * (libraries.is_of_nodes(loader) and libraries.nodes_ahead(loader))
            self._limits += [_MIXED] * (libraries.is_of_nodes(loader) and libraries.mixes_shuffled_nodes(loader))
            self.counts = False  # its state says where it is, but often not what its samplers will draw

    @override
    def at_start(self) -> dict[str, Any]:
        if isinstance(self.loader, DataLoader):
            return {"generator": self.loader.generator, "epoch": libraries.epoch_of(self.loader.dataset)}
        return {"loader": self.loader}

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        again = 0
        if state is not None and self.begins_again(skip):
            state, again = None, skip
        if state is not None:
            self._loader.load_state_dict(state)
        elif libraries.is_of_litdata(self._loader) and self._has_begun:  # else the program may have set it back
            # Only who asks for one batch more than there are lets it end an epoch that was resumed: it would come again.
            self._loader.restore = False
        self._has_begun = True
        left = [ready]
        self._ready = lambda: left.pop()() if left else None
        known = isinstance(self._loader, DataLoader)
        planned = known and not (self.draws and state is None)
        if planned:
            indices = port.indices_of(self._loader) if self.draws else self._prepare_workers()
            indices.plan = port.Plan(seed, 0, numbered=not self.draws, streams=None, ready=self._ready)
            self.indices = indices
        begin = port.iterate if known else libraries.iterate_nodes if libraries.is_of_nodes(self._loader) else iter
        with workers.ended_workers(self._loader, state):
            batches: Iterator[Any] = begin(self._loader)
        if not (planned and isinstance(batches, GeneratorType)):  # it begins, and draws for that, with its first batch
            self._ready()
        self._present = None if state is None or known else RngState.capture()
        for _ in range(again):
            next(batches)
        return batches

    @override
    def begins_again(self, batches: int) -> bool:
        # Not every worker has begun, whose datasets are then as the program makes them: no batch could show whether their
        # state is believed rightly, and to load so few again takes no longer.
        stays = not libraries.is_of_torchdata(self._loader) or self._loader.persistent_workers
        return not (self.draws or stays) and batches < self._loader.num_workers

    @override
    def first(self) -> AbstractContextManager[None]:
        return nullcontext() if isinstance(self.loader, DataLoader) else super().first()

    @override
    def beside(self) -> Iterator[Any]:
        if self._loader is self.loader and not libraries.is_of_torchdata(self.loader):
            limit = "it was iterated over a second time beside training, and has one state for both: use another object"
            self._limits += [limit] * (limit not in self._limits)
        return super().beside()

    def _prepare_workers(self) -> port.Indices:
        workers.seed_workers(self._loader, late=False, watch=self.watch)
        self._loader.worker_init_fn.anew = self.anew
        self.indices = port.indices_of(self._loader)
        return self.indices

    @override
    def end_of(self, state: Any, over: bool) -> None:
        self._has_begun = True
        if not libraries.is_of_torchdata(self._loader):
            self._loader.load_state_dict(state)
            if libraries.is_of_nodes(self._loader):  # it counts an epoch only when asked for more than there is
                next(libraries.iterate_nodes(self._loader), None)
            elif not over:  # Lightning stops at the last batch without asking whether there is another
                iter(self._loader)
        elif self._loader.persistent_workers:  # others start each epoch with the dataset as it is in this process
            self._prepare_workers()
            port.bring_to_end(self._loader, state, over=over)

    @override
    def after_first(self, batches: Iterator[Any]) -> None:
        if self.indices is not None:
            self.indices.plan = None
        self._ready()
        super().after_first(batches)

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        return self._loader.state_dict()

    @override
    def release(self) -> None:
        if libraries.is_of_litdata(self._loader) and self._has_begun:
            self._loader.restore = False  # as above, for another fit
        if isinstance(self._loader, DataLoader):
            port.release(self._loader)
        if self._loader is not self.loader:
            workers.end_workers(self._loader)
