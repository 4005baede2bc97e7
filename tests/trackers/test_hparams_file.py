"""Hyperparameters that OmegaConf cannot take apart do not end a run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from toy import ToyDataModule, ToyModel, quiet_trainer

import nemologger as nl
from nemologger.trackers import CSVLogger


@dataclass
class Config:
    """As those of transformers: its annotation names what is imported for type checkers only."""

    dtype: imported_for_type_checkers | None = None  # noqa: F821
    width: int = 8


class Configured(ToyModel):
    def __init__(self, config: Config, width: int = 8) -> None:
        super().__init__(width)
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("logger", [lambda: TensorBoardLogger("tb"), CSVLogger])
def test_a_run_trains_and_the_others_are_written(tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(max_steps=2, logger=logger())
    nl.train(Configured(Config()), ToyDataModule(), trainer, nl.NeMoLogger(name="n", log_dir=tmp_path))
    assert trainer.global_step == 2
    (file,) = tmp_path.glob("**/hparams.yaml")
    assert yaml.unsafe_load(file.read_text())["width"] == 8


class Mistaken(TensorBoardLogger):
    def save(self):
        super().save()
        raise ValueError("a mistake of the program")


def test_another_error_of_a_logger_of_the_program_is_raised(tmp_path):
    trainer = quiet_trainer(max_steps=2, logger=Mistaken(tmp_path))
    with pytest.raises(ValueError, match="a mistake of the program"):
        nl.train(ToyModel(), ToyDataModule(), trainer, nl.NeMoLogger(name="n", log_dir=tmp_path))
