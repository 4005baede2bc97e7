"""Objects of libraries that have no ``state_dict()``: what they count is named."""

from __future__ import annotations

import importlib
import itertools
import logging

import pytest
from exact.runs import Case, Net, shuffled, train
from lightning.pytorch.callbacks import Callback
from sklearn.preprocessing import StandardScaler

LIBRARY = """
import torch
class Inner:
    count = 0
class Importance:
    \"\"\"As peft's AdaLoRA has it.\"\"\"
    def __init__(self, parameters):
        self.parameters, self.budget, self.seen, self.inner = list(parameters), 10, {}, Inner()
    def update(self):
        self.budget -= 1
        self.inner.count += 1
        for number, parameter in enumerate(self.parameters):
            self.seen[number] = parameter.grad.abs() if parameter.grad is not None else torch.zeros(1)
class Table:
    def __init__(self, *numbers):
        self.numbers, self.size = torch.tensor(numbers), len(numbers)
    def __array__(self, dtype=None, copy=None):
        return self.numbers.numpy()
class Still(Importance):
    def update(self):
        pass
class InSlots:
    __slots__ = ("count",)
    def __init__(self):
        self.count = 0
    def update(self):
        self.count += 1
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "some_importance.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    return importlib.import_module("some_importance")


def test_what_has_changed_is_said_once(library, tmp_path, caplog):
    class Holds(Net):
        def __init__(self):
            super().__init__()
            self.held = [library.Importance(self.parameters()), library.Still(self.parameters()), library.InSlots()]

        def on_before_zero_grad(self, optimizer):
            for one in self.held:
                one.update()

    class Held(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.held = library.Importance(pl_module.parameters())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.held.update()

    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Holds, steps=4, callbacks=lambda: [Held()]), tmp_path / "run", 1)
    told = [record.getMessage() for record in caplog.records if "is an object of" in record.getMessage()]
    assert len(told) == 3
    assert (
        "module.held.0 is an object of some_importance.Importance, has changed since training began (budget, seen, inner)"
        in told[0]
    )
    assert "module.held.2 is an object of some_importance.InSlots, has changed since training began (count)" in told[1]
    assert "callback 0 Held.held is an object of some_importance.Importance" in told[2]


def test_an_iterator_over_a_loader_is_named(tmp_path, caplog):
    class Holds(Net):
        def __init__(self):
            super().__init__()
            self.unlabelled = iter(shuffled())

        def on_train_batch_start(self, batch, batch_idx):
            next(self.unlabelled)

    with caplog.at_level(logging.WARNING):
        train(Case(shuffled, Holds, steps=2), tmp_path / "run", 1)
    assert "module.unlabelled is an object of torch.utils.data.dataloader." in caplog.text


def test_one_that_is_made_anew_each_epoch_is_named_and_none_of_a_step_is(library, tmp_path, caplog):
    class Holds(Net):
        def on_train_epoch_start(self):
            self.clusters = library.Importance([])
            self.clusters.budget = self.current_epoch

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.passing = library.Importance([])
            self.passing.budget = batch_idx

    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Holds, steps=9), tmp_path / "run", 1)
    assert (
        "module.clusters is an object of some_importance.Importance, has changed since training began (budget)"
        in caplog.text
    )
    assert "module.passing" not in caplog.text


def test_tables_iterators_and_what_learns_are_named(library, tmp_path, caplog):
    class Holds(Net):
        def __init__(self):
            super().__init__()
            self.scaler = StandardScaler()
            self.table, self.same = library.Table(0, 0), library.Table(1)
            self.weights, self.drawn = itertools.cycle([1.0, 0.5]), (0.5**i for i in range(100))
            self.names, self.numbers = iter(["untouched"]), itertools.count()

        def training_step(self, batch, batch_idx):
            self.table.numbers[0] += 1
            self.scaler.partial_fit(batch)
            return self.note(self.loss(batch) * next(self.weights) * next(self.drawn))

    with caplog.at_level(logging.INFO):
        train(Case(shuffled, Holds, steps=2), tmp_path / "run", 1)
    told = {r.getMessage().split()[3]: r for r in caplog.records if "is an object of" in r.getMessage()}
    levels = {path: record.levelname for path, record in told.items()}
    decide = dict.fromkeys(("module.scaler", "module.weights", "module.drawn"), "WARNING")
    assert levels == {"module.table": "INFO"} | decide
    assert "is an object of some_importance.Table" in told["module.table"].getMessage()
    assert "of itertools.cycle, has changed since training began (its place)" in told["module.weights"].getMessage()
    assert "is an object of builtins.generator" in told["module.drawn"].getMessage()
