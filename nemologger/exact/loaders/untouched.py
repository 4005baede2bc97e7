"""Trying a stream, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nemologger.exact.loaders.moment import Moment
from nemologger.exact.program.owned import Owned, Values
from nemologger.exact.reach.look import Look


@contextmanager
def untouched(roots: Mapping[str, Any], most: int) -> Iterator[None]:
    """Set back what changes meanwhile of the objects in ``roots`` and below, and all generators.

    Args:
        roots: The objects, by name.
        most: Bytes of lists and arrays that are kept for that at most.
    """
    moment, owned = Moment.of(roots), Owned(roots, most=most)
    found = (getattr(holder, "__dict__", None) for holder in Look(roots).holders.values())
    own = [attributes for attributes in found if type(attributes) is dict]
    before = [dict(attributes) for attributes in own]
    try:
        yield
    finally:
        for attributes, kept in zip(own, before, strict=True):
            for name in attributes.keys() - kept.keys():
                del attributes[name]
            attributes.update(kept)
        owned.restore(Values(contents={}), exactly=True)
        moment.restore(roots, moment.digests())
