from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from processes import environment

from nemologger.check_resume import first_difference, load_recipe, main
from nemologger.errors import ConfigurationError

RECIPE = """
import fiddle as fdl
import numpy as np
import torch
from toy import BATCH, ToyData, ToyModel
from torch.utils.data import DataLoader
import nemologger as nl

class Model(ToyModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(torch.nn.functional.dropout(batch, 0.5), batch_idx){noise}

def loader():
    return DataLoader(ToyData(), batch_size=BATCH, shuffle=True)

def toy_recipe():
    trainer = fdl.Config(nl.Trainer, accelerator="cpu", devices={devices}, val_check_interval=4, limit_val_batches=1,
                         check_val_every_n_epoch=None, enable_model_summary=False)
    return fdl.Partial(nl.train, model=fdl.Config(Model), data=fdl.Config(loader), trainer=trainer)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name, value in environment().items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def write(**fields) -> str:
        (tmp_path / "recipe_of_toy.py").write_text(RECIPE.format(**{"noise": "", "devices": 1, **fields}))
        return str(tmp_path / "recipe_of_toy.py")

    return write


@pytest.mark.dist
@pytest.mark.parametrize("devices", [1, 2])
def test_a_recipe_that_resumes(recipe, capfd, devices):
    assert main([recipe(devices=devices), "--steps", "13", "--at", "7"]) == 0
    assert "no step differs" in capfd.readouterr().out


@pytest.mark.dist
def test_one_that_does_not(recipe, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # here; what is trained is in other processes
    path = recipe(noise=" * (1 + np.random.default_rng().random())")
    assert main([path, "--steps", "4", "--at", "2"]) == 1
    shown = capfd.readouterr().out
    assert "the runs differ first at step 1, rank-0: loss" in shown
    assert "two starts of this program differ without any resume" in shown
    assert "Trainer(deterministic=True, benchmark=False)" in shown


@pytest.mark.dist
def test_what_the_log_of_a_run_that_differs_names_is_shown(recipe, capfd):
    assert main([recipe(noise=" * (1 + len(vars(self)['losses']))"), "--steps", "4", "--at", "2"]) == 1
    shown = capfd.readouterr().out
    assert "the runs differ first at step 3, rank-0: loss" in shown
    assert "without any resume" not in shown
    assert shown.count("attribute module.losses is a dict that has changed since training began") == 1


def test_a_recipe_that_is_not_there(tmp_path, capfd):
    assert main([str(tmp_path / "none.py")]) == 2
    assert main(["json", "--at", "50"]) == 2
    assert "--at 50" in capfd.readouterr().out
    with pytest.raises(ConfigurationError, match=r"no module none_such; a file's name ends in \.py"):
        load_recipe("none_such.yaml")
    (tmp_path / "imports.py").write_text("import none_such")
    with pytest.raises(ModuleNotFoundError):  # the recipe's own
        load_recipe(str(tmp_path / "imports.py"))
    with pytest.raises(ConfigurationError, match="has no function called"):
        load_recipe("json")
    with pytest.raises(ConfigurationError, match="has no function nothing"):
        load_recipe("json:nothing")


def test_first_difference(tmp_path):
    def write(run: str, *lines: str) -> Path:
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "rank-0.jsonl").write_text("\n".join(lines))
        return tmp_path / run

    a = write("a", '[1, "loss 1.0"]', '[2, "loss 2.0"]')
    assert first_difference(a, write("b", '[1, "loss 1.0"]', '[2, "loss 2.0"]')) is None
    assert first_difference(a, write("b", '[1, "loss 1.0"]')) == (
        2,
        "step 2, rank-0: loss 2.0 straight, nothing resumed",
    )
    assert first_difference(a, write("b", '[1, "loss 1.5"]')) == (
        1,
        "step 1, rank-0: loss 1.0 straight, loss 1.5 resumed",
    )
