"""One way to begin, and to begin in the middle, for each kind of loader."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from nemologger.exact import port, workers
from nemologger.exact.loaders.drawn import Drawn
from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.loaders.orders import Order, in_order, keep_seed, order_of
from nemologger.exact.loaders.source import Source, copied, has_state, loading
from nemologger.exact.rng import Streams
from nemologger.exact.values import contents

log = logging.getLogger(__name__)

_AHEAD = (
    "a thread of its own loads batches ahead of training: what is drawn from torch, numpy.random or random there and by the "
    "model, at the same time, differs from run to run. Use num_workers and prefetch_factor instead of the thread"
)
_OTHERS = (
    "exact resume, training loader %s: the batches that it gave when they were loaded once more are not those that were "
    "trained on, so training goes on with others. They must not depend on what is drawn from the system, on the clock, on "
    "threads, or on what workers or the dataset keep from earlier epochs; and each number of workers has its own"
)
_MIXED = (
    "the state of its MultiNodeWeightedSampler does not say all of shuffled nodes that have come to their end: a run that "
    "is resumed after one has may take other samples. Shuffle the samples once, in the dataset, and take them in order"
)
_APPLIED = (
    "functions of map() and filter() are called ahead of training, by batches or in threads of interleave_datasets(), and "
    "for some samples again by a resumed run: what they draw from torch, numpy.random or random differs then. Draw in a "
    "map() after interleave_datasets() that is not batched, or in the collate_fn"
)
_SAY_EVERY = 10.0


class MapStyle(Source):
    """A DataLoader that looks its batches up by index: those to skip are not loaded."""

    within_epoch = "all"

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self.workers = loader.num_workers > 0
        self.asked = () if self.workers else ("dataset",)
        self.draws = not self.workers
        self.indices = port.indices_of(loader)
        self.reach = loader.num_workers * (loader.prefetch_factor or 0)
        self._plan: port.Plan | None = None
        self._expected = Drawn()
        self._order: Order | None = None
        self.isolated = not port.draws_only_at_first(self.indices.inner)
        if self.workers:
            self.watch = Watch(loader.num_workers, "batch")
        if getattr(loader, "in_order", True) is False:
            self._limits.append("in_order=False gives batches in the order in which workers finish; use in_order=True")

    @override
    def at_start(self) -> dict[str, Any]:
        below = None if self.loader.batch_sampler is None else self.loader.sampler
        roots = {"generator": self.loader.generator, "sampler": self.indices.inner, "below": below}
        return {**roots, **copied(self.loader)} if self.workers else roots

    @override
    def at_batch(self) -> dict[str, Any]:
        return loading(self.loader)

    @property
    @override
    def order(self) -> Order | None:
        return order_of(self.loader)

    @order.setter
    def order(self, order: Order | None) -> None:
        self._order = order

    @override
    def keep_seed(self, order: Order | None) -> None:
        keep_seed(order, self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if state is not None and has_state(self.loader.dataset):
            self.loader.dataset.load_state_dict(state)
        self.indices = port.indices_of(self.loader)
        if self.workers:
            workers.seed_workers(self.loader, late=False, watch=self.watch)
        streams = Streams(seed) if self.isolated else None
        plan = self._plan = self.indices.plan = port.Plan(seed, skip, self.workers, streams, ready)
        plan.order, self._order = in_order(self._order, self.loader, self.indices.inner), None
        plan.told = deque(maxlen=self.reach)
        roots, name = {"sampler": self.indices.inner}, type(self.loader).__name__
        expected, self._expected = self._expected, Drawn()
        plan.draw = lambda indices: expected.again(indices, skip, roots, name, self.reach)
        batches = port.iterate(self.loader)
        return batches if skip == 0 else self._checked(batches, plan)

    def _checked(self, batches: Iterator[Any], plan: port.Plan) -> Iterator[Any]:
        """``batches``, or what comes after the batches to skip if the loader did not ask its sampler for them."""
        for first in batches:
            if plan.begun:
                yield first
                break
            for _ in range(plan.skip - 1):
                next(batches, None)
            plan.ready()
            break
        yield from batches

    @override
    def after_first(self, batches: Iterator[Any]) -> None:
        self.indices.plan = None
        if self._plan is not None and self._plan.elsewhere and not self.workers and _AHEAD not in self._limits:
            self._limits.append(_AHEAD)

    @override
    def drawn(self, taken: int) -> Drawn:
        return Drawn() if self._plan is None else Drawn.of(self._plan, taken, self.reach)

    @override
    def sizes(self) -> list[int]:
        return [contents.length(self.loader.dataset), contents.length(self.indices.inner), self.reach]

    @override
    def expect(self, drawn: Drawn) -> None:
        self._expected = drawn

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if has_state(self.loader.dataset):
            self.loader.dataset.load_state_dict(state)

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        dataset = self.loader.dataset
        return dataset.state_dict() if not self.workers and has_state(dataset) else None

    @override
    def release(self) -> None:
        port.release(self.loader)


class Replayed(Source):
    """Any iterable without state: it is brought to its place by taking the batches before it once more.

    Without workers it draws from random streams of its own, so that it can be repeated apart from the model.
    """

    repeats = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.workers = isinstance(loader, DataLoader) and loader.num_workers > 0
        what = f"its {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else "it"
        if isinstance(loader, DataLoader) and port.has_shuffle_buffer(loader.dataset):
            self._limits.append(
                f"{what} does not have in its state_dict() what is in the buffer of shuffle(): a resumed run loads the "
                "batches of the epoch once more to find its place. Without such a buffer it goes there at once"
            )
        else:
            self._limits.append(
                f"{what} has no state_dict() and load_state_dict(): a resumed run loads the batches of the epoch once more "
                "to find its place, which is exact if they are the same each time. Add the two methods (and num_workers=0 "
                "or a torchdata StatefulDataLoader) to go there at once"
            )
        if self.workers and loader.persistent_workers:
            self.watch = Watch(loader.num_workers, "epoch")
        self._expected = (0, 0)

    @override
    def at_start(self) -> dict[str, Any]:
        if not isinstance(self.loader, DataLoader):
            return {"loader": self.loader}
        own = copied(self.loader) if self.workers else self.at_batch()
        return {"generator": self.loader.generator, "epoch": port.epoch_of(self.loader.dataset), **own}

    @override
    def at_batch(self) -> dict[str, Any]:
        return loading(self.loader) if isinstance(self.loader, DataLoader) else {"loader": self.loader}

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if self.workers:
            workers.seed_workers(self.loader, late=True, watch=self.watch)
            indices = port.indices_of(self.loader)
            indices.plan = port.Plan(seed, 0, numbered=True, streams=None, ready=lambda: None)
            batches = port.iterate(self.loader)
            indices.plan = None
        else:
            batches = _within(Streams(seed), self.loader)
        self._repeat(batches, skip)
        ready()
        return batches

    def _repeat(self, batches: Iterator[Any], skip: int) -> None:
        said = time.monotonic()
        (checked, checksum), self._expected = self._expected, (0, 0)
        for number in range(1, skip + 1):
            batch = next(batches, None)
            if number == checked and checksum and contents.of_batch(batch) != checksum:
                log.warning(_OTHERS, type(self.loader).__name__)
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                log.info("batches are loaded once more to find the place: %d of %d", number, skip)

    @override
    def expect(self, drawn: Drawn) -> None:
        self._expected = (drawn.batches, drawn.checksum)

    @override
    def release(self) -> None:
        if self.workers:
            port.release(self.loader)


def _within(streams: Streams, iterable: Any) -> Iterator[Any]:
    with streams:
        iterator = iter(iterable)
    while True:
        try:
            with streams:
                item = next(iterator)
        except StopIteration:
            return
        yield item


class IterableWithState(Source):
    """A DataLoader without workers, over an iterable dataset with state of its own."""

    draws = True
    shares = True
    within_epoch = "beside its state"

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self._set_back = False
        self._iterator_has_state = False
        self._limits += [_APPLIED] * port.applies_ahead(loader.dataset)

    @override
    def at_start(self) -> dict[str, Any]:
        return {"generator": self.loader.generator, "epoch": port.epoch_of(self.loader.dataset)}

    @override
    def at_batch(self) -> dict[str, Any]:
        return loading(self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        # In the order that torchdata has made the convention: the dataset, then its iterator, then the iterator's state.
        if state is not None and has_state(self.loader.dataset):
            self.loader.dataset.load_state_dict(state["dataset"])
            self._set_back = port.is_of_hugging_face(self.loader.dataset)
        elif self._set_back:
            port.forget_state(self.loader.dataset)
        batches: Iterator[Any] = iter(self.loader)
        iterator = port.dataset_iterator(batches)
        self._iterator_has_state = iterator is not self.loader.dataset and has_state(iterator)
        if state is not None and state["iterator"] is not None and has_state(iterator):
            iterator.load_state_dict(state["iterator"])
        ready()
        return batches

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if has_state(self.loader.dataset) and not port.is_of_hugging_face(self.loader.dataset):
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


class WithState(Source):
    """A loader that has ``state_dict`` and ``load_state_dict`` itself, or torchdata's in its place."""

    draws = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._loader: Any = loader
        self.indices: port.Indices | None = None
        self._ready: Callable[[], None] = lambda: None
        if isinstance(loader, DataLoader):
            self.shares = port.is_of_torchdata(loader) or not has_state(loader)
            stays = port.is_of_torchdata(loader) and loader.persistent_workers
            never_ends = stays and port.is_of_hugging_face(loader.dataset)
            if never_ends or not has_state(loader):
                self._loader = port.with_worker_state(loader)
            self.draws = loader.num_workers == 0
            if not self.draws:
                self.watch = Watch(loader.num_workers, "collated")
            self._limits += [_APPLIED] * port.applies_ahead(loader.dataset)
        else:
            self._limits += [_AHEAD] * (port.is_of_nodes(loader) and port.nodes_ahead(loader))
            self._limits += [_MIXED] * (port.is_of_nodes(loader) and port.mixes_shuffled_nodes(loader))
            self.counts = False  # its state says where it is, but often not what its samplers will draw

    @override
    def at_start(self) -> dict[str, Any]:
        if isinstance(self.loader, DataLoader):
            return {"generator": self.loader.generator, "epoch": port.epoch_of(self.loader.dataset)}
        return {"loader": self.loader}

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if state is not None:
            self._loader.load_state_dict(state)
        left = [ready]
        self._ready = lambda: left.pop()() if left else None
        known = isinstance(self._loader, DataLoader)
        planned = known and not (self.draws and state is None)
        if planned:
            indices = port.indices_of(self._loader) if self.draws else self._prepare_workers()
            indices.plan = port.Plan(seed, 0, numbered=not self.draws, streams=None, ready=self._ready)
            self.indices = indices
        begin = port.iterate if known else port.iterate_nodes if port.is_of_nodes(self._loader) else iter
        with workers.ended_workers(self._loader, state):
            batches: Iterator[Any] = begin(self._loader)
        if not (planned and isinstance(batches, GeneratorType)):  # it begins, and draws for that, with its first batch
            self._ready()
        return batches

    @override
    def beside(self) -> Iterator[Any]:
        if self._loader is self.loader and not port.is_of_torchdata(self.loader):
            limit = "it was iterated over a second time beside training, and has one state for both: use another object"
            self._limits += [limit] * (limit not in self._limits)
        return super().beside()

    def _prepare_workers(self) -> port.Indices:
        workers.seed_workers(self._loader, late=False, watch=self.watch)
        self.indices = port.indices_of(self._loader)
        return self.indices

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if not port.is_of_torchdata(self._loader):
            self._loader.load_state_dict(state)
            if port.is_of_nodes(self._loader):  # it counts an epoch only when one more is asked of it after a sample
                next(port.iterate_nodes(self._loader), None)
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

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        return self._loader.state_dict()

    @override
    def release(self) -> None:
        if isinstance(self._loader, DataLoader):
            port.release(self._loader)
        if self._loader is not self.loader:
            port.end_workers(self._loader)


def source_of(loader: Any) -> Source:
    """The way that fits ``loader``."""
    if not isinstance(loader, DataLoader):
        return WithState(loader) if has_state(loader) else Replayed(loader)
    own_state = has_state(loader) and not port.is_of_torchdata(loader)
    if port.is_map_style(loader):
        return WithState(loader) if own_state else MapStyle(loader)
    if own_state:
        return WithState(loader)
    if not has_state(loader.dataset) or port.has_shuffle_buffer(loader.dataset):
        return Replayed(loader)
    if loader.num_workers == 0:
        return IterableWithState(loader)
    if port.is_of_torchdata(loader):
        return WithState(loader)
    return WithState(loader) if type(loader) is DataLoader else Replayed(loader)
