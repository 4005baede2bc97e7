"""A stream that does not say where it is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from nemologger.exact import libraries, port, workers
from nemologger.exact.loaders.drawn import Drawn
from nemologger.exact.loaders.in_worker import Watch
from nemologger.exact.loaders.source import Source, copied, loading
from nemologger.exact.rng import Streams
from nemologger.exact.values import contents

log = logging.getLogger(__name__)

_OTHERS = (
    "exact resume, training loader %s: the batches that it gave when they were loaded once more are not those that were "
    "trained on, so training goes on with others. They must not depend on what is drawn from the system, on the clock, on "
    "threads, or on what workers or the dataset keep from earlier epochs; and each number of workers has its own"
)
_SAY_EVERY = 10.0


class Replayed(Source):
    """Any iterable without state: it is brought to its place by taking the batches before it once more.

    Without workers it draws from random streams of its own, so that it can be repeated apart from the model. Workers of a
    DataLoader within it are seeded for each batch, as those of one that nobody has put anything around.
    """

    repeats = True

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        inner = port.loader_within(loader)
        self.inner = inner if inner is not None and inner.num_workers > 0 else None  # whose workers these are
        self.workers = self.inner is not None
        what = f"its {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else "it"
        if isinstance(loader, DataLoader) and libraries.has_shuffle_buffer(loader.dataset):
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
        if self.inner is not None and self.inner.persistent_workers:
            self.watch = Watch(self.inner.num_workers, "epoch")
        self._expected = (0, 0)

    @override
    def at_start(self) -> dict[str, Any]:
        if not isinstance(self.loader, DataLoader):
            return {"loader": self.loader}
        own = copied(self.loader) if self.workers else self.at_batch()
        return {"generator": self.loader.generator, "epoch": libraries.epoch_of(self.loader.dataset), **own}

    @override
    def at_batch(self) -> dict[str, Any]:
        return loading(self.loader) if isinstance(self.loader, DataLoader) else {"loader": self.loader}

    @override
    def begin(self, seed: int, skip: int, state: Any, ready: Callable[[], None]) -> Iterator[Any]:
        self.note_kept()
        if self.inner is not None:
            workers.seed_workers(self.inner, late=True, watch=self.watch)
            indices = port.indices_of(self.inner)
            indices.plan = port.Plan(seed, 0, numbered=True, streams=None, ready=lambda: None)
        if self.inner is not None and self.inner is self.loader:
            batches = port.iterate(self.inner)
            self.after_first(batches)
        else:
            batches = _within(Streams(seed), self.loader, self.inner)
        self._repeat(batches, skip)
        ready()
        return batches

    @override
    def after_first(self, batches: Iterator[Any]) -> None:
        if self.inner is not None:
            port.indices_of(self.inner).plan = None

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
        if self.inner is not None:
            port.release(self.inner)


def _within(streams: Streams, iterable: Any, inner: DataLoader[Any] | None) -> Iterator[Any]:
    with streams:
        if inner is not None:
            port.draw_for_workers(inner)
        iterator = iter(iterable)
    while True:
        try:
            with streams:
                item = next(iterator)
        except StopIteration:
            return
        yield item
