"""The order of an epoch, which goes on with another number of ranks.

On several ranks Lightning shuffles with a ``DistributedSampler``, whether or not the DataLoader does. On one it leaves the
sampler of the DataLoader, which has another order: samples of the epoch would come twice, and others not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

_SHARED, _RANDOM, _PLAIN = "shared", "random", "plain"
#: Which of the three, and of one that ranks share the seed and the epoch.
Order = list[Any]


def order_of(loader: DataLoader[Any]) -> Order | None:
    """What decides about the order of the epoch that begins, beside generators; None if it is that of another sampler."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if type(sampler) is DistributedSampler and sampler.shuffle:
        return [_SHARED, sampler.seed, sampler.epoch]
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        return [_RANDOM] if sampler.generator is loader.generator else None
    return [_PLAIN] if type(sampler) is SequentialSampler else None


def keep_seed(order: Order | None, loader: DataLoader[Any]) -> None:
    """Give the sampler of ``loader`` the seed of ``order``.

    Lightning takes it from ``seed_everything()``, which may have got another number in this start: nothing else that is
    drawn depends on that when a run goes on. One that the program has given itself stays.
    """
    mine = order_of(loader)
    if order is None or mine is None or order[0] != _SHARED or mine[0] != _SHARED:
        return
    if mine[1] == int(os.environ.get("PL_GLOBAL_SEED", "0")):
        loader.batch_sampler.sampler.seed = order[1]  # type: ignore[union-attr]


def in_order(order: Order | None, loader: DataLoader[Any], batches: Any) -> BatchSampler | None:
    """A sampler in the place of ``batches``, that of ``loader``, which goes on in ``order``; None if it does so itself."""
    mine = order_of(loader)
    if order is None or mine is None or type(batches) is not BatchSampler:
        return None
    dataset: Any = loader.dataset
    if order[0] == _SHARED and mine[0] != _SHARED:
        alone: DistributedSampler[Any] = DistributedSampler(dataset, num_replicas=1, rank=0, seed=order[1])
        alone.set_epoch(order[2])
        return BatchSampler(alone, batches.batch_size, batches.drop_last)
    if order[0] != _SHARED and mine[0] == _SHARED:
        whole = (
            RandomSampler(dataset, generator=loader.generator) if order[0] == _RANDOM else SequentialSampler(dataset)
        )
        return BatchSampler(_Share(whole, batches.sampler), batches.batch_size, batches.drop_last)
    return None


class _Share:
    """What a rank takes of the order that one rank had alone."""

    def __init__(self, whole: RandomSampler | SequentialSampler, mine: Any) -> None:
        self._whole = whole
        self._mine = mine

    def __iter__(self) -> Iterator[int]:
        mine, order = self._mine, list(self._whole)
        places: DistributedSampler[Any] = DistributedSampler(
            mine.dataset, mine.num_replicas, mine.rank, shuffle=False, drop_last=mine.drop_last
        )
        return iter([order[place] for place in places])
