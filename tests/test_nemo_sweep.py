"""A search over hyperparameters as NeMo 1 has it: its YAML file, unchanged, with its launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from processes import environment
from toy import manifests

from nemologger import ConfigurationError
from nemologger.sweeps import launch
from nemologger.sweeps.launchers import BASIC, JOBLIB, NeMoLauncher, NotStarted, translated
from nemologger.sweeps.note import NoteSweep

SCRIPT = Path(__file__).parent / "helpers" / "sweep_section.py"
FIXTURES = Path(__file__).parent / "fixtures" / "exp_manager"
RECORDS = Path("nemo_experiments", "sweeps", "sweep_section", "sweep")
NAMES = [
    f"model.decoder.dropout=0.1,model.encoder.dim={dim},model.optim.lr={lr}" for dim in (4, 8) for lr in (0.001, 0.01)
]


def sweep(*overrides: str, directory: Path = FIXTURES, **extra: str) -> subprocess.CompletedProcess[str]:
    """As NeMo's documentation says to start it."""
    command = [sys.executable, str(SCRIPT), f"--config-path={directory}", "--config-name=sweep", "-m", *overrides]
    settings = {"WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", **extra}
    return subprocess.run(command, env=environment(settings), capture_output=True, text=True, timeout=240)


def diary() -> list[tuple[str, ...]]:
    """Name, GPUs and parent of each combination that ran."""
    return [tuple(line.split(" ")) for line in Path("diary").read_text().splitlines()]


def records() -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in RECORDS.glob("*/job.json")]
    return {record["name"]: record for record in found}


def test_its_combinations_train_and_what_crashed_goes_on():
    """Two of the four: first side by side, as on a machine with two GPUs, then what is left, as on one without any."""
    arguments = ("trainer.max_steps=4", "model.encoder.dim=4")
    first = sweep(*arguments, CRASH_IN=NAMES[0], CUDA_VISIBLE_DEVICES="0,1")
    assert first.returncode == 1
    assert "SweepError: 1 of 2 combinations failed" in first.stderr
    assert "RuntimeError: the third step was too much" in first.stderr
    assert os.listdir() == ["nemo_experiments"], "the working directory is littered"
    assert {name: record["state"] for name, record in records().items()} == {NAMES[0]: "failed", NAMES[1]: "finished"}
    for name in NAMES[:2]:
        printed = (RECORDS / name / "output.log").read_text()
        assert (
            f"-lr-{name.rpartition('=')[2]}-dim-4-dropout-0.1.nemo is going to be written: SteppedModel has no"
            in printed
        )

    again = sweep(*arguments, CLEAN="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == 1
    assert "step=2-last (step 2)" in again.stderr + again.stdout, "it did not go on where it was"
    values = {name: record["value"] for name, record in records().items()}
    assert values[NAMES[0]] == "4 steps on GPU ''"
    assert values[NAMES[1]] in ("4 steps on GPU '0'", "4 steps on GPU '1'")
    runs = {lr: Path("nemo_experiments", f"digits-lr-{lr}-dim-4-dropout-0.1") for lr in ("0.001", "0.01")}
    kept = runs["0.01"] / NAMES[1] / "checkpoints"
    assert [manifest.step for manifest in manifests(kept).values()] == [4, 4], "the best, and the last"
    assert os.listdir(runs["0.001"] / NAMES[0] / "checkpoints") == [], "clean_exp_ckpt was called"
    assert len(list(Path("nemo_experiments/wandb").glob("offline-run-*/run-*.wandb"))) == 3


@pytest.mark.dist
def test_a_combination_with_two_ranks_is_cleaned_once():
    """The last line of the documentation's script runs on both."""
    few = ("trainer.max_steps=2", "model.encoder.dim=4", "model.optim.lr=0.01", "exp_manager.create_wandb_logger=false")
    done = sweep("trainer.devices=2", "+trainer.strategy=ddp", *few, CLEAN="1")
    assert done.returncode == 0, done.stderr
    (run,) = Path("nemo_experiments").glob("digits-lr-0.01-dim-4-dropout-0.1/*")
    assert len(list(run.glob("nemo_log_globalrank-[01]_*"))) == 2
    assert os.listdir(run / "checkpoints") == []


@pytest.mark.parametrize(
    ("gpus", "overrides", "together", "dims"),
    [
        ("", [], 1, (4, 8)),
        ("3,5", ["hydra.launcher.num_gpus=1", "hydra.launcher.jobs_per_gpu=2", "model.encoder.dim=4"], 2, (4,)),
    ],
)
def test_all_of_its_combinations_run_on_the_gpus_it_may_use(gpus, overrides, together, dims):
    """On the CPU one after the other, or two at a time on the first of two GPUs."""
    done = sweep("trainer.max_steps=4", *overrides, CUDA_VISIBLE_DEVICES=gpus, DIARY="diary")
    assert done.returncode == 0, done.stderr
    assert sorted(name for name, *_ in diary()) == NAMES[: 2 * len(dims)]
    assert {visible for _, visible, _ in diary()} == {gpus[:1]}
    assert len({parent for *_, parent in diary()}) == together
    assert {record["value"] for record in records().values()} == {
        f"digits-lr-{lr}-dim-{dim}-dropout-0.1" for lr in ("0.01", "0.001") for dim in dims
    }
    assert sorted(os.listdir()) == ["diary", "nemo_experiments"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.launcher.num_gpus=9", "ConfigurationError: hydra.launcher.num_gpus=9: 2 GPUs (3, 5) can be seen here"),
        ("hydra.launcher.gpus=2", "Key 'gpus' not in 'NeMoLauncher'"),
    ],
)
def test_what_it_cannot_have_is_said_before_anything_starts(override, message):
    done = sweep(override, CUDA_VISIBLE_DEVICES="3,5", DIARY="diary")
    assert done.returncode == 1
    assert message in done.stderr
    assert os.listdir() == []


def configuration(trainer=None, **launcher):
    return OmegaConf.create({"hydra": {"launcher": NeMoLauncher(**launcher)}, "trainer": trainer or {}})


@pytest.mark.parametrize(
    ("launcher", "trainer", "gpus", "jobs"),
    [
        ({}, {}, "", 1),
        ({"jobs_per_gpu": 3}, {}, "", 3),
        ({}, {}, "0,1,2,3", 4),
        ({"num_gpus": 3, "jobs_per_gpu": 2}, {}, "0,1,2,3", 6),
        ({"num_gpus": 1}, {}, "0,1", 1),
        ({}, {"devices": -1}, "0,1", 2),
        ({}, {"devices": "auto"}, "0,1", 2),
        ({}, {"devices": 2}, "0,1,2,3", 2),
        ({}, {"devices": 8, "accelerator": "cpu"}, "0,1", 2),
    ],
)
def test_how_many_run_at_a_time(launcher, trainer, gpus, jobs):
    found = translated(configuration(trainer, **launcher), [gpu for gpu in gpus.split(",") if gpu])
    assert found == ({"_target_": BASIC} if jobs == 1 else {"_target_": JOBLIB, "n_jobs": jobs})


@pytest.mark.parametrize(
    ("launcher", "trainer", "gpus", "message"),
    [
        ({"jobs_per_gpu": 0}, {}, ["0"], r"hydra\.launcher\.jobs_per_gpu=0: expected .* 1 or more"),
        ({"num_gpus": 0}, {}, ["0", "1"], r"hydra\.launcher\.num_gpus=0: 2 GPUs \(0, 1\) .* expected 1 to 2, or -1"),
        (
            {"num_gpus": 1},
            {},
            [],
            r"hydra\.launcher\.num_gpus=1: no GPU can be seen here, expected -1, to run on the CPU",
        ),
        ({"num_gpus": 2}, {"devices": 3}, ["0", "1", "2"], r"trainer\.devices=3: .* more GPUs than the 2 that hydra"),
    ],
)
def test_what_it_cannot_have(launcher, trainer, gpus, message):
    with pytest.raises(ConfigurationError, match=message):
        translated(configuration(trainer, **launcher), gpus)


def test_a_setting_that_cannot_be_resolved_stops_it_too(tmp_path):
    """Hydra makes a warning of any Exception of a callback."""
    cfg = configuration(num_gpus="${gone}")
    cfg.hydra.update(runtime={"cwd": str(tmp_path)}, sweep={"dir": "."}, job={"name": "a", "config_name": "b"})
    with pytest.raises(NotStarted, match="Interpolation key 'gone' not found"):
        NoteSweep(str(tmp_path / "note")).on_multirun_start(cfg)
    assert os.listdir(tmp_path) == []


def test_without_joblibs_launcher_there_is_a_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_joblib_launcher", None)
    assert translated(configuration(), []) == {"_target_": BASIC}
    with pytest.raises(ConfigurationError, match=r"2 combinations at a time.*pip install 'nemologger\[hydra\]'"):
        translated(configuration(), ["0", "1"])


def test_hydras_store_is_as_it_was_but_for_what_plugins_add():
    repo = ConfigStore.instance().repo
    group = repo.setdefault("hydra", {}).setdefault("launcher", {})
    before = dict(group)
    group["nemo_launcher.yaml"] = "NeMo's own"
    try:
        with launch.hydra_defaults(None):
            assert group["nemo_launcher.yaml"].node.jobs_per_gpu == 1
            group["of_a_plugin.yaml"] = "found meanwhile"
        assert group == {**before, "nemo_launcher.yaml": "NeMo's own", "of_a_plugin.yaml": "found meanwhile"}
    finally:
        group.clear()
        group.update(before)
