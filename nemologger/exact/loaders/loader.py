"""What Lightning sees instead of a training loader."""

from __future__ import annotations

from typing import Any

from nemologger.exact.loaders.batches import Batches
from nemologger.exact.loaders.feed import Feed


class ResumableLoader:
    """A training loader whose place is known. Apart from being iterated over it behaves as the loader itself.

    It even says that it is one (``isinstance`` asks ``__class__``), because Lightning and its users look.

    Args:
        feed: The loader's place.
    """

    __slots__ = ("_nemologger_feed",)

    def __init__(self, feed: Feed) -> None:
        object.__setattr__(self, "_nemologger_feed", feed)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(feed_of(self).loader)

    def __iter__(self) -> Batches:
        return iter(feed_of(self))

    def __len__(self) -> int:
        return len(feed_of(self).loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(feed_of(self).loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(feed_of(self).loader, name, value)
        if name == "_iterator" and value is None:  # how Lightning tells a loader that it is done with it
            feed_of(self).release()

    def __repr__(self) -> str:
        return f"ResumableLoader({feed_of(self).loader!r})"

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the place is saved by the ExactResume callback, of every rank. That there is one tells Lightning."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; see :meth:`state_dict`."""


def feed_of(loader: ResumableLoader) -> Feed:
    """The feed behind ``loader``."""
    feed: Feed = object.__getattribute__(loader, "_nemologger_feed")
    return feed


def is_resumable(loader: object) -> bool:
    """Whether ``loader`` is a :class:`ResumableLoader`, whatever it says itself."""
    return type(loader) is ResumableLoader
