"""What all kinds of loaders have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, Literal, Protocol, TypeGuard

from torch.utils.data import DataLoader, default_collate, default_convert

from nemologger.exact import port
from nemologger.exact.loaders.drawn import Drawn
from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.loaders.orders import Order

_NAMED = 5
_OF_WORKERS = (
    "in its worker processes {} change, each worker has its own, and they are not saved: workers begin with them as the "
    "program makes them when a run is resumed, which is right for a cache. If batches depend on them, draw from torch, "
    "numpy.random, random or a generator made in __init__() (they are seeded for every batch), or use num_workers=0"
)


class HasState(Protocol):
    """What PyTorch's ecosystem calls stateful."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""


def has_state(value: Any) -> TypeGuard[HasState]:
    """Whether ``value`` is stateful, and can be asked for its state without more words."""
    # Not isinstance(), which takes 30 microseconds for an iterator that has none.
    if not all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")):
        return False
    try:
        signature(value.state_dict).bind()
    except TypeError:  # as of litdata's dataset, whose state its own loader keeps
        return False
    except ValueError:  # not written in python
        return True
    return True


AHEAD = (
    "a thread of its own loads batches ahead of training: what is drawn from torch, numpy.random or random there and by the "
    "model, at the same time, differs from run to run. Use num_workers and prefetch_factor instead of the thread"
)
_KEPT = (
    "it keeps an iterator of its own ({}) from epoch to epoch, which cannot be brought to a place: a resumed run may see "
    "other batches. Use a torch.utils.data.DataLoader with persistent_workers=True, whose workers stay as well"
)


class Source:
    """A kind of loader.

    Attributes:
        loader: The loader itself.
        draws: Whether taking a batch may draw from the process's global generators.
        within_epoch: What of :meth:`at_batch` must be saved in the middle of an epoch. Between epochs it is all.
        repeats: Whether it finds its place by loading what was trained on once more.
        asked: Of :meth:`at_start` and :meth:`at_batch` the names of what :meth:`state` has the state of, if it has one.
        shares: Whether its state is of as many workers as there are, each with a share of the data.
        counts: Whether more than generators is kept of :meth:`at_start` and :meth:`at_batch`.
        in_doubt: Whether its state may not say all, and can be tried.
        ways: Of going on by its state, those that can be tried, as values of ``anew``.
        anew: Let each worker draw for its first batch what it drew for its first one of the epoch.
    """

    draws = False
    counts = True
    in_doubt = False
    ways: tuple[bool, ...] = (False,)
    anew = False
    asked: tuple[str, ...] = ("dataset", "loader")
    repeats = False
    shares = False
    within_epoch: Literal["nothing", "beside its state", "all"] = "nothing"

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._limits: list[str] = []
        self.watch: Watch | None = None
        self._before: dict[str, Any] | None = None

    @property
    def order(self) -> Order | None:
        """What decides about the order of the epoch that begins, beside generators, if that is known."""
        return None

    @order.setter
    def order(self, order: Order | None) -> None:
        """For :meth:`begin`: go on in this order."""

    def keep_seed(self, order: Order | None) -> None:
        """Go on with the seed of ``order``, in this epoch and later ones."""

    def other_workers(self, state: Any) -> int | None:
        """How many workers ``state`` is of, if it tells of each one's share and there are others now."""
        if state is None or not self.shares:
            return None
        return None if (then := port.workers_of(state)) == self.loader.num_workers else then

    @property
    def limits(self) -> list[str]:
        """What cannot be promised, each as one sentence that says what would help."""
        before, now = self._before, port.kept_iterators(self.loader)
        if not isinstance(self.loader, DataLoader) and has_state(self.loader):
            now = {}  # its own state brings it to a place
        kept = [name for name, iterator in now.items() if before is None or before.get(name) == iterator]
        limits = [*self._limits, *(_KEPT.format(name) for name in kept)]
        told = [] if self.watch is None else self.watch.told
        if not told:
            return limits
        names = ", ".join(told[:_NAMED]) + (f" and {len(told) - _NAMED} more" if len(told) > _NAMED else "")
        return [*limits, _OF_WORKERS.format(names)]

    def note_kept(self) -> None:
        """An epoch is about to begin: an iterator for all epochs stays, and another takes the place of the newest one."""
        self._before = port.kept_iterators(self.loader)

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

    def begins_again(self, batches: int) -> bool:
        """Whether it goes on after so few batches of an epoch without its state, by loading them once more."""
        return False

    def beside(self) -> Iterator[Any]:
        """Another iterator, of somebody who looks at the data while it is trained on."""
        return port.iterate_apart(self.loader) if isinstance(self.loader, DataLoader) else iter(self.loader)

    def end_of(self, state: Any, over: bool) -> None:
        """Bring the loader to the end of the epoch that ``state`` was saved in; ``over`` if it has said so itself."""

    def first(self) -> AbstractContextManager[None]:
        """Entered while the first batch of an epoch is taken."""
        return nullcontext()

    def after_first(self, batches: Iterator[Any]) -> None:
        """Called when the first batch is out, or there was none."""

    def has_ended(self, batches: Iterator[Any]) -> bool:
        """Whether the last batch that ``batches`` gave is known to have been the last one of all."""
        return False

    def state(self, batches: Iterator[Any] | None) -> Any:
        """What else a checkpoint must hold."""
        return None

    def expect(self, drawn: Drawn) -> None:
        """For :meth:`begin`: say so if what is loaded, or drawn, once more is not this."""

    def drawn(self, taken: int) -> Drawn:
        """What has been drawn from its sampler, when so many batches have been taken."""
        return Drawn()

    def sizes(self) -> list[int]:
        """How many samples and batches there are, and how many of these are drawn ahead: a sampler may keep its place."""
        return []

    def release(self) -> None:
        """Leave the loader as it was found."""


def loading(loader: DataLoader[Any]) -> dict[str, Any]:
    """What batches are made by, in this process or in a worker."""
    plain = loader.collate_fn is default_collate or loader.collate_fn is default_convert  # nothing is in these
    return {"dataset": loader.dataset, "collate_fn": None if plain else loader.collate_fn}


def copied(loader: DataLoader[Any]) -> dict[str, Any]:
    """What workers get copies of when an epoch begins."""
    return {} if loader.persistent_workers else loading(loader)
