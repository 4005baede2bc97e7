"""A module that iterates over the training loader a second time, while the fit loop does, or before it begins."""

from __future__ import annotations

from itertools import islice

import pytest
from exact.loaders.test_loaders import (
    CountingSampler,
    LazySampler,
    Listed,
    Own,
    StatefulStream,
    Stream,
    generator_loader,
)
from exact.runs import BATCH, Augmented, Case, Net, check, shuffled, train
from torch.utils.data import DataLoader


class Neighbours(Net):
    """Looks at training data in validation, as for nearest neighbours or to settle batch norm; without an end."""

    def look(self) -> None:
        if not self.trainer.sanity_checking:
            assert len(list(islice(self.trainer.train_dataloader, 2))) == 2

    def on_validation_epoch_end(self) -> None:
        self.look()


class WholeEpoch(Neighbours):
    def look(self) -> None:
        if not self.trainer.sanity_checking:
            assert len(list(self.trainer.train_dataloader)) == 6


class BeforeTraining(Neighbours):
    def on_train_start(self) -> None:
        self.look()


CASES = {
    "shuffle": Case(shuffled, Neighbours, at=(4, 5)),
    "to the end": Case(shuffled, WholeEpoch, at=(4, 7)),
    "before training": Case(shuffled, BeforeTraining, at=(2,)),
    "before training, unsized": Case(lambda: DataLoader(Stream(), batch_size=BATCH), BeforeTraining, at=(2,)),
    "own generator": Case(generator_loader, Neighbours, at=(4,)),
    "lazy sampler": Case(lambda: DataLoader(Augmented(), batch_size=BATCH, sampler=LazySampler()), Neighbours, at=(4,)),
    "sampler with a counter": Case(
        lambda: DataLoader(Augmented(), batch_size=BATCH, sampler=CountingSampler()), Neighbours, at=(4,)
    ),
    "workers that stay": Case(lambda: shuffled(num_workers=1, persistent_workers=True), Neighbours, at=(5,)),
    "stream": Case(lambda: DataLoader(Stream(), batch_size=BATCH), Neighbours, at=(4,)),
    "stream with state": Case(lambda: DataLoader(StatefulStream(), batch_size=BATCH), Neighbours, at=(4,)),
    "any iterable": Case(Listed, Neighbours, at=(4,)),
}


def test_a_loader_with_one_state_for_all_is_named_when_it_is_saved(tmp_path, caplog):
    train(Case(Own, Neighbours, steps=5), tmp_path, 1)
    told = [record.getMessage() for record in caplog.records if "a second time beside training" in record.getMessage()]
    assert len(told) == 1
    assert "training loader Own" in told[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_goes_on_where_it_was(case, tmp_path):
    check(case, tmp_path)
