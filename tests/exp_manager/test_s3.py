"""NeMo 1's example with checkpoints in S3: its YAML file, unchanged, by exp_manager and by the file it is migrated to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.run_section import QUIET, by_call, by_recipe
from omegaconf import OmegaConf
from toy import ToyDataModule, ToyModel

import nemologger as nl
from nemologger.checkpoint.manifest import read
from nemologger.exp_manager import exp_manager
from nemologger.migrate import migrate
from nemologger.stores.path import storage_path

CONFIG = Path(__file__).parents[1] / "fixtures" / "exp_manager" / "s3.yaml"
URL = OmegaConf.load(CONFIG).exp_manager.checkpoint_callback_params.dirpath
BUCKET = URL.removeprefix("s3://").partition("/")[0]


@pytest.fixture
def bucket(s3):
    """The bucket of the example, empty."""

    def objects() -> list[str]:
        return [one["Key"] for one in s3.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    s3.client.create_bucket(Bucket=BUCKET)
    yield objects
    empty(s3, objects())
    s3.client.delete_bucket(Bucket=BUCKET)


def empty(s3, keys) -> None:
    for key in keys:
        s3.client.delete_object(Bucket=BUCKET, Key=key)


def steps() -> dict[str, int]:
    """The checkpoints in the bucket, all whole."""
    found = {path.name: path for path in storage_path(URL).iterdir() if path.is_dir()}
    assert all(nl.verify_checkpoint(path).ok for path in found.values())
    return {name: read(path).step for name, path in found.items()}


def resumes(how, file: Path, caplog) -> None:
    """The second life of the run, which goes on where the first ended."""
    caplog.clear()
    how(file, max_steps=10)
    assert f"resuming from {URL}/" in caplog.text
    assert "(step 5)" in caplog.text


def test_two_lives_leave_the_same_in_the_bucket_both_ways(bucket, s3, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nemologger")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(migrate(CONFIG))
    left = []
    for how, file in ((by_call, CONFIG), (by_recipe, recipe)):
        here = tmp_path / how.__name__
        here.mkdir()
        monkeypatch.chdir(here)
        how(file, max_steps=5)
        resumes(how, file, caplog)
        left.append((bucket(), steps()))
        assert not list(here.rglob("*.distcp")), "a checkpoint on the local disk"
        assert (here / "nemo_experiments" / "digits" / "first" / "run_0").is_dir()
        empty(s3, bucket())
    assert left[0] == left[1]
    assert sorted(left[0][1].values()) == [5, 10, 10]


def test_saving_beside_training_the_migrated_file_goes_on_with_the_run_of_the_section(bucket, tmp_path, caplog):
    """Saving beside training is a field of the section, and one of the plugin's settings."""
    caplog.set_level(logging.INFO, "nemologger")
    section, plugin = OmegaConf.load(CONFIG), OmegaConf.load(CONFIG)
    section.exp_manager.checkpoint_callback_params.async_save = True
    plugin.s3_checkpointing.enable_async_checkpointing = True
    recipe = tmp_path / "recipe.py"
    for cfg, name in ((section, "section.yaml"), (plugin, "plugin.yaml")):
        OmegaConf.save(cfg, tmp_path / name)
    recipe.write_text(migrate(tmp_path / "plugin.yaml"))
    assert "async_save=True" in recipe.read_text()
    trainer, _ = by_call(tmp_path / "section.yaml", max_steps=5)
    assert trainer.checkpoint_callback.async_save
    resumes(by_recipe, recipe, caplog)
    assert sorted(steps().values()) == [5, 10, 10]


class NeMoModel(ToyModel):
    """Has what NeMo's models have; like theirs it writes to a local path."""

    def save_to(self, save_path: str) -> None:
        torch.save({key: value.clone() for key, value in self.state_dict().items()}, Path(save_path))


def test_the_nemo_file_is_in_the_bucket_too(bucket, s3, tmp_path):
    cfg = OmegaConf.load(CONFIG)
    cfg.exp_manager.checkpoint_callback_params.always_save_nemo = True
    trainer = nl.Trainer(**{**OmegaConf.to_container(cfg.trainer), **QUIET})
    exp_manager(trainer, cfg.exp_manager)
    model = NeMoModel()
    trainer.fit(model, datamodule=ToyDataModule())
    s3.client.download_file(BUCKET, "first/checkpoints/digits.nemo", str(tmp_path / "file"))
    assert torch.equal(torch.load(tmp_path / "file")["net.0.weight"], model.net[0].weight)
    assert sorted(steps().values()) == [5, 10, 10]
    assert not list(Path().rglob("*.nemo"))


def test_a_model_that_writes_nothing_is_named(bucket):
    cfg = OmegaConf.load(CONFIG)
    trainer = nl.Trainer(**{**OmegaConf.to_container(cfg.trainer), **QUIET, "max_steps": 5})
    exp_manager(trainer, cfg.exp_manager)
    model = NeMoModel()
    model.save_to = lambda save_path: None
    with pytest.raises(
        nl.NotFoundError, match=r"save_to\(save_path='.*/digits\.nemo'\) has left no file there.*s3://digits-of"
    ):
        trainer.fit(model, datamodule=ToyDataModule())
    assert 5 in steps().values()
