"""A loader that looks its batches up by index."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from nemologger.exact import port, workers
from nemologger.exact.loaders.drawn import Drawn
from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.loaders.orders import Order, in_order, keep_seed, order_of
from nemologger.exact.loaders.source import AHEAD, Source, copied, has_state, loading
from nemologger.exact.rng import Streams
from nemologger.exact.values import contents


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
        self.note_kept()
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
        if self._plan is not None and self._plan.elsewhere and not self.workers and AHEAD not in self._limits:
            self._limits.append(AHEAD)

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
