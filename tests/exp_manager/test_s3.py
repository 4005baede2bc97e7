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
from nemologger.store_path import storage_path

CONFIG = Path(__file__).parents[1] / "fixtures" / "exp_manager" / "s3.yaml"
URL = OmegaConf.load(CONFIG).exp_manager.checkpoint_callback_params.dirpath
BUCKET = URL.removeprefix("s3://").partition("/")[0]


@pytest.fixture(autouse=True)
def no_version(monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)


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


def configurations(tmp_path, *, beside: bool) -> tuple[Path, Path]:
    """For exp_manager, and to be migrated. Saving beside training is the section's field, or the plugin's."""
    if not beside:
        return CONFIG, CONFIG
    section, plugin = OmegaConf.load(CONFIG), OmegaConf.load(CONFIG)
    section.exp_manager.checkpoint_callback_params.async_save = True
    plugin.s3_checkpointing.enable_async_checkpointing = True
    files = tmp_path / "section.yaml", tmp_path / "plugin.yaml"
    for cfg, file in zip((section, plugin), files, strict=True):
        OmegaConf.save(cfg, file)
    return files


@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside"])
def test_two_lives_leave_the_same_in_the_bucket_both_ways(bucket, s3, tmp_path, monkeypatch, caplog, beside):
    caplog.set_level(logging.INFO, "nemologger")
    config, to_migrate = configurations(tmp_path, beside=beside)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(migrate(to_migrate))
    assert ("async_save=True" in recipe.read_text()) is beside
    left = []
    for how, file in ((by_call, config), (by_recipe, recipe)):
        here = tmp_path / how.__name__
        here.mkdir()
        monkeypatch.chdir(here)
        how(file, max_steps=5)
        assert set(steps().values()) == {5}
        caplog.clear()
        how(file, max_steps=10)
        assert f"resuming from {URL}/" in caplog.text
        assert "(step 5)" in caplog.text
        left.append((bucket(), steps()))
        assert not list(here.rglob("*.distcp")), "a checkpoint on the local disk"
        assert (here / "nemo_experiments" / "digits" / "first" / "run_0").is_dir()
        empty(s3, bucket())
    assert left[0] == left[1]
    assert sorted(left[0][1].values()) == [5, 10, 10]


class NeMoModel(ToyModel):
    """Has what NeMo's models have; like theirs it writes to a local path."""

    def save_to(self, save_path: str) -> None:
        torch.save({key: value.clone() for key, value in self.state_dict().items()}, Path(save_path))


@pytest.mark.parametrize("postfix", [".nemo", ".safetensors"])
def test_the_nemo_file_is_in_the_bucket_too(bucket, s3, tmp_path, postfix):
    cfg = OmegaConf.load(CONFIG)
    cfg.exp_manager.checkpoint_callback_params.postfix = postfix
    cfg.exp_manager.checkpoint_callback_params.always_save_nemo = True
    trainer = nl.Trainer(**{**OmegaConf.to_container(cfg.trainer), **QUIET})
    exp_manager(trainer, cfg.exp_manager)
    model = NeMoModel()
    trainer.fit(model, datamodule=ToyDataModule())
    key = f"first/checkpoints/digits{postfix}"
    s3.client.download_file(BUCKET, key, str(tmp_path / "file"))
    if postfix == ".nemo":
        saved = torch.load(tmp_path / "file")
    else:
        from safetensors.torch import load_file

        saved = load_file(tmp_path / "file")
    assert torch.equal(saved["net.0.weight"], model.net[0].weight)
    assert sorted(steps().values()) == [5, 10, 10]
    assert not list(Path().rglob("*.nemo"))
