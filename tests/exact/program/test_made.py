from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from exact.runs import BATCH, Augmented, Case, Net, shuffled, train
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from nemologger.exact.program.made import made, made_otherwise

SAID = "is not what it was when the run began"


class Holder:
    def __init__(self, **parts):
        vars(self).update(parts)


def otherwise(then: object, now: object) -> bool:
    return made_otherwise(made({"it": Holder(part=then)}), made({"it": Holder(part=now)})) == ["it.part"]


@given(st.lists(st.text(), unique=True), st.randoms())
def test_the_same_names_in_another_order_are_noticed(names, random):
    shuffled = random.sample(names, len(names))
    assert otherwise(names, shuffled) == (names != shuffled)
    numbers, again = ({name: i for i, name in enumerate(order)} for order in (names, shuffled))
    assert otherwise(numbers, again) == (numbers != again)
    assert otherwise(dict(enumerate(names)), dict(enumerate(shuffled))) == (names != shuffled)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (["a", "b"], ["a", "c"]),
        (["a", "b"], ["b", "a", "c"]),
        ({"lr": 1, "momentum": 2}, {"lr": 2, "momentum": 3}),
        ({"b": 2, "a": 1}, {"a": 1, "b": 2}),
        (np.zeros(3), np.ones(4)),
        (torch.zeros(3), torch.ones(3, dtype=torch.float64)),
        ([1.5, 2.5], [2.5, 1.5]),
        (3, 4),
        ([Holder(), "a"], ["a", Holder()]),
    ],
)
def test_what_somebody_may_have_meant_is_not(then, now):
    assert not otherwise(then, now)


def test_objects_within_parts_of_a_module_and_arrays_are_looked_at():
    class Part(torch.nn.Module):
        def __init__(self, start):
            super().__init__()
            self.register_buffer("passing", torch.full((2,), start), persistent=False)
            self.register_buffer("saved", torch.full((2,), start))
            self.alias = self.saved.view(-1)
            self.noise = np.full(2, start)

    class Outer(torch.nn.Module):
        def __init__(self, start):
            super().__init__()
            self.part = Part(start)
            self.coder = Holder(names=["x", "y"] if start else ["y", "x"])

    then, now = (made({"module": Outer(start)}) for start in (0.0, 1.0))
    assert sorted(made_otherwise(then, now)) == ["module.coder.names", "module.part.noise", "module.part.passing"]


_VOCABULARY = """
import sys
sys.path[:0] = {paths!r}
from exact.runs import Augmented, Case, Net, shuffled, train
from torch.utils.data import DataLoader
from pathlib import Path
import logging
logging.getLogger("nemologger").addHandler(logging.StreamHandler(sys.stdout))

class Words(Augmented):
    def __init__(self):
        super().__init__()
        self.words = {{word: i for i, word in enumerate(set("the quick brown fox jumps over a lazy dog".split()))}}

here = Path(sys.argv[1])
case = Case(lambda: DataLoader(Words(), batch_size=4))
train(case, here / sys.argv[2], 1, *([here / "a" / "step=4"] if sys.argv[2] == "b" else []), stop_at=4)
"""


def test_a_vocabulary_that_a_set_numbers_is_named_in_the_next_process(tmp_path):
    paths = [entry for entry in sys.path if entry]
    program = tmp_path / "program.py"
    program.write_text(_VOCABULARY.format(paths=paths))
    outputs = [
        subprocess.run(
            [sys.executable, program, tmp_path, name], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for name, seed in (("a", "1"), ("b", "2"))
    ]  # fmt: skip
    assert SAID not in outputs[0]
    assert outputs[1].count(f"training loader DataLoader: dataset.words {SAID}") == 1
    assert outputs[1].count(SAID) == 1


class Drawn(Net):
    """Makes an array without a seed, and validates with one that it changes."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.seed()
            self.noise = torch.randn(4)
        self.seen = np.zeros(2)

    def loss(self, batch):
        return super().loss(batch) + self.noise.sum()

    def validation_step(self, batch, batch_idx):
        self.seen += 1
        super().validation_step(batch, batch_idx)


class Moving(Drawn):
    def training_step(self, batch, batch_idx):
        self.noise = self.noise * 0.9
        return super().training_step(batch, batch_idx)


class Saving(Drawn):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["noise"] = self.noise

    def on_load_checkpoint(self, checkpoint):
        self.noise = checkpoint["noise"]


class Watching(Callback):
    def __init__(self):
        self.sample = np.random.default_rng().random(3)


def warnings_of(tmp_path, caplog, **case) -> list[str]:
    made_of = Case(shuffled, **case)
    train(made_of, tmp_path / "a", 1, stop_at=4)
    assert SAID not in caplog.text
    train(made_of, tmp_path / "b", 2, tmp_path / "a" / "step=4")
    return [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


def test_what_is_drawn_without_a_seed_is_named(tmp_path, caplog):
    told = warnings_of(tmp_path, caplog, model=Drawn)
    assert [message.partition(" is not")[0] for message in told] == ["exact resume, attribute module.noise"]


def test_that_of_a_callback_too(tmp_path, caplog):
    (told,) = warnings_of(tmp_path, caplog, callbacks=lambda: [Watching()])
    assert "Watching.sample" in told


@pytest.mark.parametrize("model", [Moving, Saving, Net])
def test_not_if_it_is_brought_back(tmp_path, caplog, model):
    assert warnings_of(tmp_path, caplog, model=model) == []


class Filing(Augmented):
    """Begins with its files in some order, and shuffles them for each epoch."""

    def __init__(self):
        super().__init__()
        self.files = list(np.random.default_rng().permutation(self.samples))
        self.files = [str(file) for file in self.files]

    def __getitem__(self, index):
        if index == self.samples - 1:
            self.files.reverse()
        return super().__getitem__(int(self.files[index]))


def test_names_that_are_brought_back_are_not_named(tmp_path, caplog):
    case = Case(lambda: DataLoader(Filing(), batch_size=BATCH))
    train(case, tmp_path / "a", 1, stop_at=8)
    train(case, tmp_path / "b", 1, tmp_path / "a" / "step=8")
    assert SAID not in caplog.text


class Large(Net):
    def __init__(self):
        super().__init__()
        self.counts = np.zeros(3_000_000)

    def training_step(self, batch, batch_idx):
        self.counts += 1
        return super().training_step(batch, batch_idx)


def test_what_was_named_as_too_large_is_not_named_as_made_otherwise(tmp_path, caplog):
    model = Large()
    for directory, resume in (("a", None), ("b", tmp_path / "a" / "step=4")):
        train(Case(shuffled, lambda: model, steps=5), tmp_path / directory, 1, resume, stop_at=None if resume else 4)
    assert "module.counts has changed since training began, and is not saved: it is too large" in caplog.text
    assert SAID not in caplog.text


def test_versions_that_know_nothing_of_names_find_the_data_as_they_had_written_it(tmp_path):
    train(Case(lambda: DataLoader(Filing(), batch_size=BATCH)), tmp_path, 1, stop_at=4)
    saved = torch.load(tmp_path / "step=4" / "weights" / "common.pt", weights_only=True)["callbacks"]["ExactResume"]
    assert [set(data) for data in saved["data"]] == [{"samples", "chosen", "content", "batch_size"}]
    assert [set(names) for names in saved["names"]] == [{"dataset.files"}]
