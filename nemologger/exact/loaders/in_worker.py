"""What a worker process does beside loading: it seeds a dataset's own generators, and tells of what changes there."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
import xxhash
from torch.utils.data import get_worker_info

from nemologger.exact.program.owned import Owned, Values
from nemologger.exact.rng import generator_state, reseed
from nemologger.exact.values import contents

_ROOM = 2048
#: A number that so many looks saw grow, or shrink, counts something: of random ones one in twenty thousand does.
_STEPS = 8


class Watch:
    """Goes to every worker of a loader with its ``worker_init_fn``.

    A worker has its own copies of the dataset and the ``collate_fn``, and they end with it. Of a map-style dataset their
    generators are seeded for each batch anew, as the global ones are, so that it does not matter which worker loads it, nor
    after which others. Other things that change there are told to the process that trains, which can name them.

    Args:
        workers: How many there are.
        each: ``"batch"`` if a batch may depend on nothing that changed with others; ``"epoch"`` if an epoch may not;
            ``"collated"`` if what a batch is made of has a state, which is saved: only the ``collate_fn`` is looked at, and
            no batch can be loaded again.
    """

    def __init__(self, workers: int, each: Literal["batch", "epoch", "collated"]) -> None:
        self._each = each
        self._told = torch.zeros(workers, _ROOM, dtype=torch.uint8)
        self._told.share_memory_()  # type: ignore[no-untyped-call]
        self._owned: Owned | None = None
        self._first: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._counts: dict[str, list[Any]] = {}
        self._fetcher: Any = None
        self._fetched = 0
        self._again = False
        self._dataset: Any = None
        self._state: int | None = None
        self._fleeting: set[str] = set()

    def before(self, fetcher: Any, seed: int) -> None:
        """A batch is about to be loaded, whose number is ``seed``."""
        if self._owned is None:
            dataset = {} if self._each == "collated" else {"dataset": fetcher.dataset}
            self._owned = Owned({**dataset, "collate_fn": fetcher.collate_fn}, light=True)
            self._first = self._owned.generators
            self._names = _first_alike(self._first)
            self._dataset = fetcher.dataset if self._each == "batch" else None
            self._state = _state_of(self._dataset)
        if self._each != "epoch":
            for path, generator in self._first.items():
                reseed(generator, xxhash.xxh3_64_intdigest(self._names[path].encode(), seed & (2**64 - 1)))
        elif self._fetcher is not fetcher:
            values = self._owned.values()
            if self._fetcher is None:
                self._first = values.generators
            else:
                self._tell(values, [p for p, s in values.generators.items() if _sign(s) != _sign(self._first.get(p))])
            self._fetcher = fetcher

    def after(self) -> bool:
        """It has been loaded; whether to do so again, because a generator was made for it that nobody had seeded.

        Another worker, or the next run, may make it for another batch.
        """
        if (
            self._each == "batch"
            and self._fetched < _STEPS
            and self._owned is not None
            and self._take_late(self._owned)
        ):
            self._again = True
            return True
        self._again = False
        self._count()
        return False

    def _take_late(self, owned: Owned) -> bool:
        present = owned.generators
        late = {p: g for p, g in present.items() if self._first.get(p) is not g and p not in self._fleeting}
        if self._again:  # made anew for each batch, or sample
            self._fleeting.update(late)
            self._first = {path: one for path, one in self._first.items() if path not in late}
            return False
        self._names |= _first_alike(late)
        self._first |= late
        return bool(late)

    def _count(self) -> None:
        self._fetched += 1
        often = self._fetched <= _STEPS or self._fetched & (self._fetched - 1) == 0
        if self._each != "epoch" and self._owned is not None and often:
            values = self._owned.values()
            # A dataset with a state that has changed says itself that it decides.
            decides = _state_of(self._dataset) != self._state
            counts = {p: value for p, value in values.counters.items() if self._counts_on(p, value) or decides}
            late = [path for path in values.generators if path not in self._first]
            self._tell(replace(values, counters=counts), late)

    def _counts_on(self, path: str, value: Any) -> bool:
        """Whether a number is more, or less, each time: others are most often notes of what was drawn for a sample."""
        seen = self._counts.setdefault(path, [])
        seen.append(value)
        if type(value) not in (int, float) or len(seen) < _STEPS or any(type(one) not in (int, float) for one in seen):
            return False
        pairs = list(pairwise(seen))
        return all(one < next_ for one, next_ in pairs) or all(one > next_ for one, next_ in pairs)

    def _tell(self, values: Values, generators: list[str]) -> None:
        owned, info = self._owned, get_worker_info()
        if owned is None or info is None:
            return
        within = tuple(f"{path}." for path in owned.lost)  # of an object that was made late its name is enough
        paths = {
            path for path in (*values.counters, *(values.contents or ()), *generators) if not path.startswith(within)
        }
        data = "\n".join(sorted({*paths, *owned.lost})).encode()
        if len(data) > _ROOM:
            whole, _, cut = data[:_ROOM].rpartition(b"\n")
            data = whole or cut
        self._told[info.id] = torch.frombuffer(bytearray(data.ljust(_ROOM, b"\0")), dtype=torch.uint8)

    @property
    def told(self) -> list[str]:
        """The paths of what has changed in any worker, as far as they have said so."""
        texts = (bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in self._told if row[0])
        return sorted({path for text in texts for path in text.split("\n")})


def _state_of(dataset: Any) -> int | None:
    """A number for what its ``state_dict()`` says; None if it has none, or that cannot be told."""
    try:
        return contents.fingerprint(dataset.state_dict()) if hasattr(dataset, "state_dict") else None
    except Exception:  # noqa: BLE001  it is the program's
        return None


def _first_alike(generators: dict[str, Any]) -> dict[str, str]:
    """For each generator the path of the first in the same state: two that draw the same, for image and mask, go on so."""
    first: dict[str, str] = {}
    return {path: first.setdefault(_sign(generator_state(one)), path) for path, one in generators.items()}


def _sign(state: Any) -> str:
    """A text that another state of a generator does not have."""
    if isinstance(state, torch.Tensor):
        return str(contents.fingerprint(state))
    return repr({name: _sign(part) for name, part in state.items()} if isinstance(state, dict) else state)
