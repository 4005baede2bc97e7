"""One way to begin, and to begin in the middle, for each kind of loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Literal, Protocol, runtime_checkable

from torch.utils.data import DataLoader
from typing_extensions import override

from nemologger.exact import port
from nemologger.exact.owned import Owned
from nemologger.exact.rng import Streams

_EMPTY = CellType()


@runtime_checkable
class HasState(Protocol):
    """What PyTorch's ecosystem calls stateful."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""


class Source:
    """A kind of loader.

    Attributes:
        loader: The loader itself.
        draws: Whether taking a batch may draw from the process's global generators.
        within_epoch: What of :meth:`at_batch` must be saved in the middle of an epoch. Between epochs it is all.
        limits: What cannot be promised, each as one sentence that says what would help.
    """

    draws = False
    within_epoch: Literal["nothing", "generators", "all"] = "nothing"

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.limits: list[str] = []

    def at_start(self) -> dict[str, Any]:
        """The objects whose state at the beginning of an epoch decides about its batches."""
        return {}

    def at_batch(self) -> dict[str, Any]:
        """The objects that change with every batch."""
        return {}

    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        """An iterator that goes on after ``skip`` batches.

        The global generators are as they were when the epoch began. ``ready`` sets them to the present: it is called
        once, after all that is repeated and before anything new is loaded.
        """
        raise NotImplementedError

    def beside(self) -> Iterator[Any]:
        """Another iterator, of somebody who looks at the data while it is trained on."""
        return port.iterate_apart(self.loader) if isinstance(self.loader, DataLoader) else iter(self.loader)

    def end_of(self, state: Any, over: bool) -> None:
        """Bring the loader to the end of the epoch that ``state`` was saved in; ``over`` if it has said so itself."""

    def after_first(self, batches: Iterator[Any]) -> None:
        """Called when the first batch is out, or there was none."""

    def state(self, batches: Iterator[Any] | None) -> Any:
        """What else a checkpoint must hold."""
        return None

    def release(self) -> None:
        """Leave the loader as it was found."""


class MapStyle(Source):
    """A DataLoader that looks its batches up by index: those to skip are not loaded."""

    within_epoch = "all"

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self.workers = loader.num_workers > 0
        self.draws = not self.workers
        self.indices = port.indices_of(loader)
        self.isolated = not port.draws_only_at_first(self.indices.inner)
        if self.workers:
            self.limits += _limits_of_workers(loader)
        if getattr(loader, "in_order", True) is False:
            self.limits.append("in_order=False gives batches in the order in which workers finish; use in_order=True")

    @override
    def at_start(self) -> dict[str, Any]:
        below = None if self.loader.batch_sampler is None else self.loader.sampler
        return {"generator": self.loader.generator, "sampler": self.indices.inner, "below": below}

    @override
    def at_batch(self) -> dict[str, Any]:
        return {} if self.workers else _loading(self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if state is not None and isinstance(self.loader.dataset, HasState):
            self.loader.dataset.load_state_dict(state)
        self.indices = port.indices_of(self.loader)
        if self.workers:
            port.seed_workers(self.loader, late=False)
        streams = Streams(seed) if self.isolated else None
        plan = self.indices.plan = port.Plan(seed, skip, self.workers, streams, ready)
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

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if isinstance(self.loader.dataset, HasState):
            self.loader.dataset.load_state_dict(state)

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        dataset = self.loader.dataset
        return dataset.state_dict() if not self.workers and isinstance(dataset, HasState) else None

    @override
    def release(self) -> None:
        port.release(self.loader)


class Replayed(Source):
    """Any iterable without state: it is brought to its place by taking the batches before it once more.

    Without workers it draws from random streams of its own, so that it can be repeated apart from the model.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.workers = isinstance(loader, DataLoader) and loader.num_workers > 0
        what = f"its {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else "it"
        self.limits.append(
            f"{what} has no state_dict() and load_state_dict(): a resumed run loads the batches of the epoch once more to "
            "find its place, which is exact if they are the same each time. Add the two methods (and num_workers=0 or a "
            "torchdata StatefulDataLoader) to go there at once"
        )
        if self.workers:
            self.limits += _limits_of_workers(loader)

    @override
    def at_start(self) -> dict[str, Any]:
        if not isinstance(self.loader, DataLoader):
            return {"loader": self.loader}
        return {"generator": self.loader.generator, **self.at_batch()}

    @override
    def at_batch(self) -> dict[str, Any]:
        if not isinstance(self.loader, DataLoader):
            return {"loader": self.loader}
        return {} if self.workers else _loading(self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if self.workers:
            port.seed_workers(self.loader, late=True)
            indices = port.indices_of(self.loader)
            indices.plan = port.Plan(seed, 0, numbered=True, streams=None, ready=lambda: None)
            batches = port.iterate(self.loader)
            indices.plan = None
        else:
            batches = _within(Streams(seed), self.loader)
        for _ in range(skip):
            next(batches, None)
        ready()
        return batches

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
    within_epoch = "generators"

    @override
    def at_start(self) -> dict[str, Any]:
        return {"generator": self.loader.generator}

    @override
    def at_batch(self) -> dict[str, Any]:
        return _loading(self.loader)

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        # In the order that torchdata has made the convention: the dataset, then its iterator, then the iterator's state.
        if state is not None and isinstance(self.loader.dataset, HasState):
            self.loader.dataset.load_state_dict(state["dataset"])
        batches: Iterator[Any] = iter(self.loader)
        iterator = port.dataset_iterator(batches)
        if state is not None and state["iterator"] is not None and isinstance(iterator, HasState):
            iterator.load_state_dict(state["iterator"])
        ready()
        return batches

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if isinstance(self.loader.dataset, HasState):
            self.loader.dataset.load_state_dict(state["dataset"])

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        iterator = None if batches is None else port.dataset_iterator(batches)
        own = None
        if iterator is not self.loader.dataset and isinstance(iterator, HasState):
            own = iterator.state_dict()
        return {"dataset": self.loader.dataset.state_dict(), "iterator": own}


class WithState(Source):
    """A loader that has ``state_dict`` and ``load_state_dict`` itself, or torchdata's in its place."""

    draws = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._loader: Any = loader
        self.indices: port.Indices | None = None
        if isinstance(loader, DataLoader):
            if not isinstance(loader, HasState):
                self._loader = port.with_worker_state(loader)
            self.draws = loader.num_workers == 0

    @override
    def at_start(self) -> dict[str, Any]:
        return {"generator": getattr(self.loader, "generator", None)}

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        if state is not None:
            self._loader.load_state_dict(state)
        if not self.draws:
            self._prepare_workers().plan = port.Plan(seed, 0, numbered=True, streams=None, ready=lambda: None)
        known = isinstance(self._loader, DataLoader)
        batches: Iterator[Any] = port.iterate(self._loader) if known else iter(self._loader)
        ready()
        return batches

    @override
    def beside(self) -> Iterator[Any]:
        if self._loader is self.loader and not port.is_of_torchdata(self.loader):
            limit = "it was iterated over a second time beside training, and has one state for both: use another object"
            self.limits += [limit] * (limit not in self.limits)
        return super().beside()

    def _prepare_workers(self) -> port.Indices:
        port.seed_workers(self._loader, late=False)
        self.indices = port.indices_of(self._loader)
        return self.indices

    @override
    def end_of(self, state: Any, over: bool) -> None:
        if not port.is_of_torchdata(self._loader):
            self._loader.load_state_dict(state)
            if not over:  # Lightning stops at the last batch without asking whether there is another
                iter(self._loader)
        elif self._loader.persistent_workers:  # others start each epoch with the dataset as it is in this process
            self._prepare_workers()
            port.bring_to_end(self._loader, state)

    @override
    def after_first(self, batches: Iterator[Any]) -> None:
        if self.indices is not None:
            self.indices.plan = None

    @override
    def state(self, batches: Iterator[Any] | None) -> Any:
        return self._loader.state_dict()

    @override
    def release(self) -> None:
        if isinstance(self._loader, DataLoader):
            port.release(self._loader)
        if self._loader is not self.loader:
            port.end_workers(self._loader)


def _loading(loader: DataLoader[Any]) -> dict[str, Any]:
    """What batches are made by, in this process or in a worker."""
    return {"dataset": loader.dataset, "collate_fn": _behind(loader.collate_fn)}


def _behind(function: Any) -> Any:
    """Where ``function`` may keep something from call to call: itself, or what it was bound to or made with."""
    if isinstance(function, partial):
        return [_behind(function.func), *function.args, *function.keywords.values()]
    if isinstance(function, FunctionType):
        return [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
    return function.__self__ if isinstance(function, MethodType) else function


def _limits_of_workers(loader: DataLoader[Any]) -> list[str]:
    return [
        f"each worker has its own copy of the generator {path}, which starts from the beginning when a run is resumed; draw "
        "from torch, numpy.random or random instead (they are seeded for every batch), or use num_workers=0"
        for path in Owned(_loading(loader), counters=False).generators
    ]


def source_of(loader: Any) -> Source:
    """The way that fits ``loader``."""
    if not isinstance(loader, DataLoader):
        return WithState(loader) if isinstance(loader, HasState) else Replayed(loader)
    own_state = isinstance(loader, HasState) and not port.is_of_torchdata(loader)
    if port.is_map_style(loader):
        return WithState(loader) if own_state else MapStyle(loader)
    if own_state:
        return WithState(loader)
    if not isinstance(loader.dataset, HasState):
        return Replayed(loader)
    if loader.num_workers == 0:
        return IterableWithState(loader)
    if port.is_of_torchdata(loader):
        return WithState(loader)
    return WithState(loader) if type(loader) is DataLoader else Replayed(loader)
