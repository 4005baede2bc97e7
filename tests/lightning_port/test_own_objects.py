"""Places of objects, also those that a file makes up."""

from __future__ import annotations

import pytest
from toy import ToyDataModule, ToyModel, quiet_trainer

from nemologger.lightning_port import at, places_of


@pytest.fixture
def trainer(tmp_path):
    trainer = quiet_trainer(max_steps=1, default_root_dir=tmp_path)
    model = ToyModel()
    model.loss_of = [object()]
    trainer.fit(model, ToyDataModule())
    return trainer


def test_an_object_is_found_in_its_place(trainer):
    found = trainer.lightning_module.loss_of[0]
    place = places_of(trainer)(found)
    assert place == ("module", "loss_of", 0)
    assert at(trainer, list(place)) is found


@pytest.mark.parametrize(
    "place", ["module", 3, None, [["module"]], ["module", {}], [None], ["module", "none"], ["x", 1]]
)
def test_what_is_no_place_is_nothing(trainer, place):
    assert at(trainer, place) is None
