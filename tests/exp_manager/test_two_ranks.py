"""One run directory for all ranks, whoever starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.run_section import by_call
from processes import python, torchrun
from toy import names

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_section.py"

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  max_steps: {steps}
  val_check_interval: 2
  check_val_every_n_epoch: null
  limit_val_batches: 1
  num_sanity_val_steps: 0
  logger: false
  enable_checkpointing: false
exp_manager:
  exp_dir: runs
  use_datetime_version: false
  checkpoint_callback_params: {{every_n_train_steps: 2, save_top_k: 1, postfix: .pt}}
"""
RESUME = "  resume_if_exists: true\n  resume_ignore_no_checkpoint: true\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)


@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_versions_are_counted_once_for_all_ranks(tmp_path, launcher):
    """With all that NeMo 1 has by itself."""
    config, runs = tmp_path / "c.yaml", tmp_path / "runs" / "default"
    config.write_text(CONFIG.format(steps=2))
    (runs / "version_0").mkdir(parents=True)
    if launcher == "torchrun":
        torchrun(SCRIPT, 2, config)
    else:
        python(SCRIPT, config)
    assert names(runs) == ["version_0", "version_1"]
    run = runs / "version_1"
    assert len(list(run.glob("nemo_log_globalrank-*"))) == 2
    assert (run / "checkpoints" / "default.pt").is_file()
    (last,) = run.glob("checkpoints/*-last")
    assert len(list(last.glob("weights/__1_*.distcp"))) >= 1
    assert names(runs / "version_0") == []


@pytest.mark.dist
def test_all_ranks_resume_from_the_same_checkpoint_or_fail_together(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(steps=2) + "  resume_if_exists: true\n")
    with pytest.raises(AssertionError, match=r"(?s)NotFoundError.*NotFoundError"):
        torchrun(SCRIPT, 2, config)
    config.write_text(CONFIG.format(steps=4) + RESUME)
    by_call(config, devices=1, strategy="auto", max_steps=2)
    assert "Restored all states from the checkpoint at" in torchrun(SCRIPT, 2, config).stderr
    (last,) = (tmp_path / "runs" / "default" / "checkpoints").glob("*-last")
    assert last.name.endswith("step=4-last")
