"""Going through one training loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemologger.exact.loaders.feed import Feed


class Batches:
    """The batches of one epoch of a :class:`Feed`, or those of somebody who only looks at them."""

    __slots__ = ("_again", "_begun", "_beside", "_ended", "_feed", "inner")

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._begun = False
        self._ended = False
        self._beside: Iterator[Any] | None = None
        self._again: list[Any] = []
        self.inner: Iterator[Any] = iter(())

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        if not self._begun and self._beside is None:
            self._settle()
        if self._beside is not None:
            return next(self._beside)
        if self._again:
            return self._again.pop(0)
        if self._ended:
            raise StopIteration
        feed = self._feed
        feed.before_batch(feed)
        try:
            if self._begun:
                batch = feed.take(self)
            else:
                self._begun = True
                batch = feed.take_first(self)
        except StopIteration:
            self._ended = True
            raise
        feed.after_batch(feed, batch)
        return batch

    def _settle(self) -> None:
        """Before the first batch: whose they are."""
        if not self._feed.is_training(self):
            self._beside = self._feed.beside()
        elif (early := self._feed.taken_early()) is not None:
            before, self._again = early
            self.inner, self._begun = before.inner, True
            self._feed.follow(self)
