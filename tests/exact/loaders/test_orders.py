"""The order of an epoch on another number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, WeightedRandomSampler

from nemologger.exact.loaders.orders import in_order, keep_seed, order_of


def one_rank(samples, shuffle=True):
    return DataLoader(range(samples), batch_size=2, shuffle=shuffle, generator=torch.Generator().manual_seed(3))


def of_several(samples, rank, ranks, epoch=4, **options):
    loader = one_rank(samples)
    sampler = DistributedSampler(loader.dataset, ranks, rank, seed=7, **options)
    sampler.set_epoch(epoch)
    return DataLoader(loader.dataset, batch_size=2, sampler=sampler, generator=loader.generator)


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_rank_goes_on_in_the_order_of_several(shuffle):
    ranks = [list(of_several(24, rank, 2).batch_sampler) for rank in (0, 1)]
    order = order_of(of_several(24, 0, 2))
    loader = one_rank(24, shuffle)
    alone = list(in_order(order, loader, loader.batch_sampler))
    for batch in range(6):
        together = sorted(ranks[0][batch] + ranks[1][batch])
        assert sorted(alone[2 * batch] + alone[2 * batch + 1]) == together


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("samples", [24, 23])
def test_several_go_on_in_the_order_of_one(samples, shuffle):
    order = order_of(one_rank(samples, shuffle))
    alone = list(one_rank(samples, shuffle).batch_sampler)
    loaders = [of_several(samples, rank, 2) for rank in (0, 1)]
    ranks = [list(in_order(order, loader, loader.batch_sampler)) for loader in loaders]
    for batch in range(5):
        assert sorted(ranks[0][batch] + ranks[1][batch]) == sorted(alone[2 * batch] + alone[2 * batch + 1])
    assert {index for batches in ranks for batch in batches for index in batch} == set(range(samples))


@pytest.mark.parametrize(
    "loader",
    [
        of_several(6, 0, 2, shuffle=False),
        DataLoader(range(6), batch_size=2, sampler=WeightedRandomSampler([1.0] * 6, 6)),
        DataLoader(range(6), batch_size=2, sampler=RandomSampler(range(6), generator=torch.Generator())),
        DataLoader(range(6), batch_size=None),
    ],
)
def test_others_have_their_own(loader):
    assert order_of(loader) is None
    assert in_order(["shared", 7, 4], loader, loader.batch_sampler) is None


def test_the_same_kind_goes_on_by_itself():
    loader = of_several(6, 1, 3, epoch=5)
    assert order_of(loader) == ["shared", 7, 5]
    assert in_order(["shared", 7, 5], loader, loader.batch_sampler) is None
    assert in_order(["plain"], one_rank(6), one_rank(6).batch_sampler) is None


@pytest.mark.parametrize(("seed", "kept"), [("7", 3), ("8", 7)])
def test_the_seed_of_lightning_is_kept_and_that_of_the_program_is_not(seed, kept, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    loader = of_several(6, 0, 2)
    keep_seed(["shared", 3, 1], loader)
    assert order_of(loader) == ["shared", kept, 4]
