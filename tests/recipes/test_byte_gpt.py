"""The main recipe, as a newcomer runs it: train, stop, run again."""

from __future__ import annotations

import shlex
import signal
import sysconfig
from pathlib import Path

import fiddle as fdl
import torch
from processes import python, started, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import manifests

from nemologger.checkpoint import manifest

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "byte_gpt.py"


def _run(directory: Path, steps: int, **options):
    return python(
        SCRIPT, "--dir", directory, "--max-steps", steps, "--val-check-interval", 2, "--batch-size", 2, **options
    )


def test_it_trains_says_where_everything_is_and_goes_on(tmp_path):
    directory = tmp_path / "my runs"
    first = _run(directory, 4).stdout
    checkpoints = directory / "byte_gpt" / "checkpoints"
    last = next(checkpoints.glob("*-last"))
    assert f"run directory    {directory / 'byte_gpt'}" in first
    assert f"last checkpoint  {last}" in first
    assert "best checkpoint  " in first
    curves = next(line for line in first.splitlines() if line.startswith("curves"))
    assert shlex.split(curves)[-3:] == ["tensorboard.main", "--logdir", str(directory / "tb_logs" / "byte_gpt")]
    assert "The model writes:\n\ndef " in first
    second = _run(directory, 6)
    assert "resuming from" in second.stderr
    assert sorted({m.step for m in manifests(checkpoints).values()}) in ([4, 6], [2, 6], [6])
    events = EventAccumulator(str(directory / "tb_logs" / "byte_gpt"))
    events.Reload()
    steps = [scalar.step for scalar in events.Scalars("val_loss")]
    assert len(steps) == len(set(steps)) == 3
    assert any("sample" in tag for tag in events.Tags()["tensors"])


def test_stopped_in_the_middle_it_goes_on(tmp_path):
    checkpoints = tmp_path / "byte_gpt" / "checkpoints"
    arguments = ["--dir", tmp_path, "--max-steps", 500, "--val-check-interval", 2, "--batch-size", 2]
    known: set[str] = set()
    for how in signal.SIGINT, signal.SIGKILL:
        with started(SCRIPT, *arguments) as process:
            wait_for(lambda known=known: _last(checkpoints) - known)
            process.send_signal(how)
            assert process.wait(timeout=60) != 0
        known = _last(checkpoints)
    reached = max(manifest.read(path.parent).step for path in checkpoints.glob("*/manifest.json"))
    again = _run(tmp_path, reached + 2)
    assert f"(step {reached})" in again.stderr
    assert max(m.step for m in manifests(checkpoints).values()) == reached + 2


def _last(checkpoints: Path) -> set[str]:
    return {path.parent.name for path in checkpoints.glob("*-last/manifest.json")}


def test_the_recipe_is_a_configuration_to_change(tmp_path):
    from byte_gpt import pretrain_recipe
    from byte_gpt_model import ByteGPT

    recipe = pretrain_recipe(name="other", dir=str(tmp_path))
    assert isinstance(recipe, fdl.Partial)
    recipe.model.layers = 1
    assert recipe.model.__fn_or_cls__ is ByteGPT
    assert len(fdl.build(recipe.model).blocks) == 1


def test_the_model_has_about_a_million_parameters():
    from byte_gpt_model import ByteGPT

    assert 0.8e6 < sum(p.numel() for p in ByteGPT().parameters()) < 1.2e6


def test_the_text_is_split_by_file():
    from source_text import SourceText

    data = SourceText(length=16, batch_size=2, validation_batches=2)
    data.setup("fit")
    source = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    assert bytes(data.validation[0].tolist()) in source or len(data.validation) == 4
    assert len(data.validation) == 4
    assert len(data.train) > 10_000
    window = data.train[5]
    assert window.shape == (17,)
    assert window.dtype == torch.int64
    assert torch.equal(data.train[5][-1], data.train[6][0])
