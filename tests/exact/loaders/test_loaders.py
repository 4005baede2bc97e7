"""Every kind of loader that Lightning trains with."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from exact.runs import BATCH, SAMPLES, Augmented, Case, check, check_chain, shuffled
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader


class LazySampler(Sampler):
    """Draws an index only when it is asked for one, from all generators."""

    def __init__(self, samples=SAMPLES):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __iter__(self):
        for _ in range(self.samples):
            yield (int(torch.randint(self.samples, (1,))) + np.random.randint(5) + random.randrange(5)) % self.samples


class CountingSampler(LazySampler):
    """Has a generator and an epoch of its own."""

    def __init__(self):
        super().__init__()
        self.rng, self.epoch = np.random.default_rng(3), 0

    def __iter__(self):
        self.epoch += 1
        for _ in range(self.samples):
            yield int(self.rng.integers(self.samples) * self.epoch) % self.samples


class Owner(Augmented):
    """Generators and a counter among its attributes."""

    def __init__(self):
        super().__init__()
        self.rngs = {"a": np.random.default_rng(1), "b": [random.Random(2), np.random.RandomState(5)]}
        self.torch = torch.Generator().manual_seed(4)
        self.served = 0

    def __getitem__(self, index):
        self.served += 1
        python, numpy = self.rngs["b"]
        noise = self.rngs["a"].normal() + python.random() + numpy.normal() + self.served / 100
        return super().__getitem__(index) + noise + torch.rand(1, generator=self.torch)


class Remembers(Augmented):
    """A map-style dataset with state."""

    def __init__(self):
        super().__init__()
        self.seen = [0]

    def __getitem__(self, index):
        self.seen[0] += 1
        return super().__getitem__(index) + self.seen[0] / 10

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


class Late(Augmented):
    """Begins to count and to draw when it is first asked; its class says what it begins with."""

    served, torch = 0, None

    def __getitem__(self, index):
        self.served += 1
        if not hasattr(self, "rngs"):
            self.rngs, self.torch = np.random.default_rng(1), torch.Generator().manual_seed(4)
        return super().__getitem__(index) + self.rngs.random() + self.served / 100 + torch.rand(1, generator=self.torch)


class Noted(Augmented):
    """Notes what it has drawn for a sample, as MONAI's transforms; makes an order and a mean when it first needs them."""

    def __init__(self):
        super().__init__()
        self.noise, self.order, self.mean, self.scales, self.made = None, None, None, None, False

    def __getitem__(self, index):
        if not self.made:
            self.order, self.made = np.random.permutation(self.samples), True
        self.noise, self.scales = torch.rand(4), [random.random(), 1.0]
        self.mean = self.noise if self.mean is None else 0.9 * self.mean + 0.1 * self.noise
        return super().__getitem__(int(self.order[index])) * self.scales[0] + self.mean


class LateSampler(LazySampler):
    """Makes its generator for the first epoch."""

    def __iter__(self):
        self.rng = getattr(self, "rng", None) or random.Random(3)
        yield from self.rng.sample(range(self.samples), self.samples)


class Masks:
    """A ``collate_fn`` with a generator of its own."""

    def __init__(self):
        self.rng, self.batches = random.Random(5), 0

    def __call__(self, samples):
        self.batches += 1
        return torch.stack(samples) * self.rng.random() + self.batches / 10


def masking():
    """A function around one."""
    masks = Masks()
    return lambda samples: masks(samples)


class Stream(IterableDataset):
    """Shuffles with a buffer, from the global generators."""

    def __init__(self, samples=SAMPLES):
        self.samples = samples

    def __iter__(self):
        buffer = []
        for index in range(self.samples):
            buffer.append(index)
            if len(buffer) == 5:
                chosen = buffer.pop(random.randrange(5))
                yield torch.full((4,), chosen + torch.rand(1).item() + np.random.rand())
        yield from (torch.full((4,), float(index)) for index in buffer)


class SizedStream(Stream):
    def __len__(self):
        return self.samples


class EagerStream(SizedStream):
    """Shuffles before it begins."""

    def __iter__(self):
        return iter([torch.full((4,), float(i)) + torch.rand(1) for i in torch.randperm(self.samples)])


class StatefulStream(IterableDataset):
    """Goes on where its state says, and draws from the global generators."""

    def __init__(self, samples=SAMPLES):
        self.samples, self.next, self.passes, self.reads = samples, 0, 0, 0

    def __iter__(self):
        while self.next < self.samples:
            index, self.next = self.next, self.next + 1
            self.reads += 1
            yield torch.full((4,), index + self.passes / 2) + torch.rand(1) + np.random.rand()
        self.next, self.passes = 0, self.passes + 1

    def state_dict(self):
        return {"next": self.next, "passes": self.passes}

    def load_state_dict(self, state):
        self.next, self.passes = state["next"], state["passes"]


class FlaggedStream(StatefulStream):
    """The other way that is usual: only the pass after ``load_state_dict`` begins in the middle."""

    def __init__(self, samples=SAMPLES):
        super().__init__(samples)
        self.resume = None

    def __iter__(self):
        self.begin()
        while self.next < self.samples:
            index, self.next = self.next, self.next + 1
            yield torch.full((4,), index + self.passes / 2) + torch.rand(1) + np.random.rand()

    def begin(self):
        self.passes += self.resume is None
        self.next, self.resume = self.resume or 0, None

    def load_state_dict(self, state):
        self.resume, self.passes = state["next"], state["passes"]


class SizedFlagged(FlaggedStream):
    def __len__(self):
        return self.samples


class Generating(DataLoader):
    """A subclass whose ``__iter__`` is a generator."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch + 1


class Own:
    """No DataLoader, but with state."""

    def __init__(self):
        self.next = 0

    def __len__(self):
        return 6

    def __iter__(self):
        while self.next < 6:
            self.next += 1
            yield torch.full((2, 4), float(self.next)) + torch.rand(1)
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Listed:
    """Any iterable, with random batches."""

    def __init__(self, length=6):
        self.length = length

    def __iter__(self):
        return iter([torch.rand(2, 4) + random.random() for _ in range(self.length)])


class Unsized:
    """Batches of indices, nobody knows how many."""

    def __iter__(self):
        order = torch.randperm(SAMPLES).tolist()
        for i in range(0, SAMPLES, BATCH):
            yield order[i : i + BATCH]


def generator_loader():
    return shuffled(generator=torch.Generator().manual_seed(7))


def replacing():
    sampler = RandomSampler(
        range(SAMPLES), replacement=True, num_samples=50, generator=torch.Generator().manual_seed(1)
    )
    return DataLoader(Augmented(), batch_size=8, sampler=sampler)


def of(dataset, **options):
    return DataLoader(dataset, **{"batch_size": BATCH, **options})


class ItsOwnIterator(Sampler):
    """As lhotse's: it begins anew whenever it is asked for an iterator."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self._order = iter(random.Random(self.epoch).sample(range(SAMPLES), SAMPLES))
        return self

    def __next__(self):
        return [next(self._order), next(self._order)]


LOADERS = {
    "generator": generator_loader,
    "replacement": replacing,
    "weighted": lambda: of(Augmented(), sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
    "lazy sampler": lambda: of(Augmented(), sampler=LazySampler()),
    "counting sampler": lambda: of(Augmented(), sampler=CountingSampler()),
    "batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(range(SAMPLES)), 4, drop_last=True)
    ),
    "no batching": lambda: DataLoader(Augmented(7), batch_size=None, shuffle=True),
    "subclass": lambda: Generating(Augmented(), batch_size=BATCH, shuffle=True),
    "owned": lambda: of(Owner(), shuffle=True),
    "notes": lambda: of(Noted(), shuffle=True),
    "begins late": lambda: of(Late(), sampler=LateSampler(), collate_fn=masking()),
    "stream, collate": lambda: of(Stream(), collate_fn=Masks()),
    "map with state": lambda: of(Remembers(), shuffle=True),
    "its own iterator": lambda: DataLoader(Augmented(), batch_sampler=ItsOwnIterator()),
    "unsized sampler": lambda: DataLoader(Augmented(), batch_sampler=Unsized()),
    "stream": lambda: of(Stream()),
    "sized stream": lambda: of(SizedStream()),
    "eager stream": lambda: of(EagerStream()),
    "stateful stream": lambda: of(StatefulStream()),
    "flagged stream": lambda: of(FlaggedStream()),
    "sized flagged stream": lambda: of(SizedFlagged()),
    "torchdata": lambda: StatefulDataLoader(Augmented(), batch_size=BATCH, shuffle=True),
    "torchdata stream": lambda: StatefulDataLoader(StatefulStream(), batch_size=BATCH),
    "own loader": Own,
    "list": lambda: [torch.full((2, 4), float(i)) for i in range(6)],
    "iterable": Listed,
    "max_size_cycle": lambda: {"a": shuffled(), "b": of(Augmented(10), shuffle=True)},
    "max_size_cycle unsized": lambda: [of(Stream()), of(Stream(10))],
    "max_size": lambda: CombinedLoader([shuffled(), of(Augmented(10), shuffle=True)], "max_size"),
    "max_size unsized": lambda: CombinedLoader([of(Stream(10)), of(Stream())], "max_size"),
    "min_size": lambda: CombinedLoader([shuffled(), of(Stream())], "min_size"),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_every_step(loader, tmp_path):
    check(Case(loader), tmp_path)


@pytest.mark.parametrize("name", ["stream", "stateful stream", "max_size_cycle unsized", "owned", "own loader"])
def test_chain(name, tmp_path):
    check_chain(Case(LOADERS[name]), tmp_path)
