"""One run directory for all ranks, whoever starts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import python, torchrun

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
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(steps=2))
    for version in range(2):
        if launcher == "torchrun":
            torchrun(SCRIPT, 2, config)
        else:
            python(SCRIPT, config)
        assert {path.name for path in (tmp_path / "runs" / "default").iterdir()} == {
            f"version_{n}" for n in range(version + 1)
        }
    for run in (tmp_path / "runs" / "default").iterdir():
        assert len(list(run.glob("nemo_log_globalrank-*"))) == 2
        assert (run / "checkpoints" / "default.pt").is_file()
        (last,) = run.glob("checkpoints/*-last")
        assert len(list(last.glob("weights/__1_*.distcp"))) >= 1


@pytest.mark.dist
def test_all_ranks_resume_from_the_same_checkpoint_or_fail_together(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(steps=2) + "  resume_if_exists: true\n")
    with pytest.raises(AssertionError, match=r"(?s)NotFoundError.*NotFoundError"):
        torchrun(SCRIPT, 2, config)
    for steps in (2, 4):
        config.write_text(CONFIG.format(steps=steps) + RESUME)
        torchrun(SCRIPT, 2, config)
    (last,) = (tmp_path / "runs" / "default" / "checkpoints").glob("*-last")
    assert last.name.endswith("step=4-last")
