"""A migrated file is the section: it passes the linter, and leaves on disk what exp_manager leaves."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.run_section import by_call, by_recipe, module_of
from helpers.sections import bare_trainer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from processes import environment, python
from toy import names

import nemologger as nl
from nemologger.combination import VARIABLE
from nemologger.errors import ConfigurationError, NotFoundError
from nemologger.exp_manager import ExpManagerConfig, exp_manager
from nemologger.exp_manager.calls import Call, Name
from nemologger.exp_manager.source import expression
from nemologger.migrate import main, migrate
from nemologger.run.directory import VERSION_VARIABLE

FIXTURES = Path(__file__).parent / "fixtures" / "exp_manager"
NEEDS = {"mlflow": "mlflow", "clearml": "clearml"}
CASES = sorted(path.stem for path in FIXTURES.glob("*.yaml"))
STORES = ("s3",)  # tests/exp_manager/test_s3.py runs them
# Trackers that keep something for the whole process, and what they leave.
OWN_PROCESS = {
    "wandb": "nemo_experiments/wandb/offline-run-*/run-*.wandb",
    "clearml": "nemo_experiments/digits/*/clearml/offline/*/metrics.jsonl",
}
SCRIPT = Path(__file__).parent / "helpers" / "run_section.py"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("NEMO_EXPM_VERSION", raising=False)
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")


# What differs between any two runs: times, hosts, identifiers.
_MASKS = (
    (r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "DATE"),
    (r"tfevents\..*", "tfevents"),
    (r"offline-run-.*?(?=/|$)", "offline-run"),
    (r"run-\w{8}\.wandb", "run.wandb"),
    (r"[0-9a-f]{32}", "ID"),
)


def tree(directory: Path) -> set[str]:
    """The files below ``directory``, but for what trackers put into directories of their own."""
    found = set()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        for pattern, mask in _MASKS:
            name = re.sub(pattern, mask, name)
        if path.is_file() and "offline-run" not in name and "mlruns/" not in name:
            found.add(name)
    return found


def steps(directory: Path) -> dict[str, tuple[int, dict[str, float]]]:
    """Step and metrics of every checkpoint, without those that are times."""
    found = {}
    for path in sorted(directory.rglob("manifest.json")):
        manifest = json.loads(path.read_text())
        metrics = {k: v for k, v in manifest["metrics"].items() if k in ("val_loss", "train_loss")}
        found[path.parent.name] = (manifest["step"], metrics)
    return found


def prepare(case: str, tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """The directories in which ``case`` is to run, its file, and the one that this is migrated to."""
    if case in NEEDS:
        pytest.importorskip(NEEDS[case])
    called, migrated = tmp_path / "called", tmp_path / "migrated"
    config, recipe = FIXTURES / f"{case}.yaml", tmp_path / "recipe.py"
    for directory in (called, migrated):
        directory.mkdir(parents=True)
        (directory / "notes.txt").write_text("mine\n")
    recipe.write_text(migrate(config))
    return called, migrated, config, recipe


def run_both(case: str, tmp_path: Path, monkeypatch, times: int = 1) -> tuple[Path, Path]:
    """The directories in which ``case`` ran by exp_manager, and by the file it was migrated to."""
    called, migrated, config, recipe = prepare(case, tmp_path)
    for life in range(1, times + 1):
        limit = {} if times == 1 else {"max_steps": 5 * life}
        for directory, how, file in ((called, by_call, config), (migrated, by_recipe, recipe)):
            monkeypatch.chdir(directory)
            if case == "sweep":
                monkeypatch.setenv("WANDB_MODE", "disabled")  # the search itself has a test of its own
            how(file, **limit)
    return called, migrated


def compare(called: Path, migrated: Path) -> None:
    """Both have left the same."""
    assert tree(called) == tree(migrated)
    assert steps(called) == steps(migrated)
    assert len(steps(called)) >= 2


@pytest.mark.parametrize("case", [case for case in CASES if case not in (*STORES, *OWN_PROCESS)])
def test_a_migrated_section_gives_the_same_run(case, tmp_path, monkeypatch):
    compare(*run_both(case, tmp_path, monkeypatch))


def test_so_it_does_with_trackers_that_know_one_run_per_process(tmp_path):
    """All in one process, in which each run has one of its own."""
    prepared = {case: prepare(case, tmp_path / case) for case in OWN_PROCESS}
    python(
        SCRIPT,
        *(f"{config}@{called}" for called, _, config, _ in prepared.values()),
        *(f"{recipe}@{migrated}" for _, migrated, _, recipe in prepared.values()),
    )
    for case, (called, migrated, *_) in prepared.items():
        compare(called, migrated)
        for directory in (called, migrated):
            (left,) = directory.glob(OWN_PROCESS[case])
            assert left.stat().st_size > 0


def test_so_it_does_when_it_resumes(tmp_path, monkeypatch):
    called, migrated = run_both("resume", tmp_path, monkeypatch, times=2)
    compare(called, migrated)
    run = migrated / "nemo_experiments" / "digits" / "first"
    assert (run / "run_0" / "cmd-args.log").is_file()
    assert {step for step, _ in steps(run).values()} == {5, 10}


@pytest.mark.parametrize(
    "command",
    [
        ["check", "--select=E,F,W,I,UP,B,C4,SIM,RET,PIE,RUF,ANN,D1,T20", "--ignore=ANN401,E501"],
        ["check"],
        ["format", "--diff", "--line-length=88"],
        ["format", "--diff", "--line-length=120"],
    ],
    ids=" ".join,
)
def test_what_is_written_passes_the_linter(command, tmp_path):
    pytest.importorskip("ruff")
    everything = tmp_path / "everything_on.yaml"
    section = {f.name: True for f in fields(ExpManagerConfig) if f.name.startswith("create_")}
    section |= {"ema": {"enable": True}, "max_time_per_run": "00:01:00:00"}
    OmegaConf.save({"exp_manager": section}, everything)
    for file in (*(FIXTURES / f"{case}.yaml" for case in CASES), everything):
        assert main([str(file), "--out", str(tmp_path / f"{file.stem}.py")]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "."],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_and_the_file_it_writes_are_run_as_people_do(tmp_path, monkeypatch):
    """Two processes: one writes the recipe, the other trains with it."""
    recipe = tmp_path / "out" / "recipe.py"
    command = [sys.executable, "-m", "nemologger.migrate", str(FIXTURES / "tensorboard.yaml"), "--out", str(recipe)]
    subprocess.run(command, check=True, env=environment(), timeout=120)
    done = subprocess.run(
        [sys.executable, str(recipe), "toy:ToyModel", "toy:ToyDataModule"],
        cwd=tmp_path, env=environment(), timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(steps(tmp_path / "experiments" / "digits")) == 3
    monkeypatch.setattr(sys, "argv", [str(recipe)])
    with pytest.raises(SystemExit, match=r"usage: .*my_module:Model my_module:Data"):
        runpy.run_path(str(recipe), run_name="__main__")


def test_every_key_is_accounted_for(tmp_path):
    text = migrate(FIXTURES / "everything_else.yaml")
    section = OmegaConf.load(FIXTURES / "everything_else.yaml").exp_manager
    for key, value in section.items():
        names = [f"{key}.{inner}" for inner in value] if OmegaConf.is_dict(value) else [key]
        for name in names:
            assert f"#   {name}:" in text
    assert "seconds_to_sleep is not needed" in text
    assert "checkpoint_callback_params.model_parallel_size has no effect" in text
    assert 'timer_kwargs={"reduction": "mean", "sync_cuda": False, "buffer_size": 3}' in text
    assert "number_versions=True" in text
    assert "train_time_interval=timedelta(seconds=1800)" in text


def test_interpolations_and_other_sections_are_mentioned(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "/data/runs")
    file = tmp_path / "c.yaml"
    file.write_text(
        "name: n\nmodel: {lr: 1}\ntrainer: {max_epochs: 3, gpus: 2, logger: true, callbacks: [x], devices: 1}\n"
        "exp_manager: {exp_dir: '${oc.env:RUNS}', name: '${name}', files_to_copy: ['a-${name}.txt']}\n"
    )
    text = migrate(file)
    assert 'log_dir="/data/runs"' in text
    for line in (
        "#   exp_dir: ${oc.env:RUNS}",
        "#   files_to_copy[0]: a-${name}.txt",
        "# Other sections of the file are not used here: name, model.",
        "#   trainer.gpus (it was 2) is no argument of this Lightning's Trainer.",
        "#   trainer.logger was True; with exp_manager it has to be False",
        "#   trainer.callbacks is not translated",
    ):
        assert line in text
    assert '"max_epochs": 3' in text
    assert '"gpus"' not in text


def test_what_hydra_would_make_for_the_trainer_is_made(tmp_path):
    file, recipe = tmp_path / "c.yaml", tmp_path / "recipe.py"
    file.write_text(
        "steps: ???\ntrainer:\n  accelerator: cpu\n  devices: 1\n  max_epochs: ???\n  max_steps: ${steps}\n"
        "  strategy: {_target_: pytorch_lightning.strategies.DDPStrategy, gradient_as_bucket_view: true}\n"
        "  plugins: [{_target_: gone.Plugin}]\nexp_manager: {name: n}\n"
    )
    recipe.write_text(migrate(file))
    flat = " ".join(recipe.read_text().replace("#", "").split())
    assert "trainer.max_epochs has no value in the file (???): give it as run(model, data, max_epochs=...)." in flat
    assert "trainer.max_steps has no value" in flat
    assert "trainer.plugins (it was [{'_target_': 'gone.Plugin'}]) is not translated: No module named 'gone'." in flat
    trainer = module_of(recipe).make_trainer(max_epochs=2)
    assert type(trainer.strategy) is DDPStrategy
    assert trainer.strategy._ddp_kwargs["gradient_as_bucket_view"] is True
    assert trainer.max_epochs == 2


@pytest.mark.parametrize(
    ("hydras", "said"),
    [
        ("_convert_: all, _recursive_: true", None),
        ("_partial_: true", "_partial_ is for Hydra, and asks for more than a call of lightning.pytorch"),
        ("_recursive_: false", "_recursive_ is for Hydra"),
        ("_args_: [1]", "_args_ is for Hydra"),
    ],
)
def test_how_hydra_would_make_it_is_no_argument(tmp_path, hydras, said):
    file = tmp_path / "c.yaml"
    target = f"{{_target_: lightning.pytorch.strategies.DDPStrategy, {hydras}}}"
    file.write_text(f"trainer: {{strategy: {target}}}\nexp_manager: {{name: n}}\n")
    text = migrate(file)
    assert ('"strategy": DDPStrategy(),' in text) == (said is None)
    assert said is None or said in " ".join(text.replace("#", "").split())


def test_what_has_nothing_below_it_is_accounted_for(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "trainer: 3\nhydra: text\ndefaults: other\ns3_checkpointing: [1]\n"
        "exp_manager: {ema: null, checkpoint_callback_params: {}}\n"
    )
    text = migrate(file)
    for key in ("ema", "checkpoint_callback_params"):
        assert f"#   {key}: nothing is below it, so it has NeMo 1's defaults" in text
    assert "# Other sections of the file are not used here: trainer, hydra, defaults,\n#   s3_checkpointing." in text


def test_what_can_be_no_argument_is_left_out_and_said(tmp_path):
    kwargs = {"project": "p", "log-model": True, 3: 4, "class": 5}
    section = {"create_wandb_logger": True, "wandb_logger_kwargs": kwargs}
    file = tmp_path / "c.yaml"
    OmegaConf.save({"exp_manager": section}, file)
    text = migrate(file)
    compile(text, "recipe.py", "exec")
    for key in ("log-model", 3, "class"):
        assert f"#   wandb_logger_kwargs.{key} cannot be set: no argument has such a name." in text
    with pytest.raises(ConfigurationError, match=r"wandb_logger_kwargs\.log-model cannot be set"):
        exp_manager(bare_trainer(), section)


def test_the_plugin_for_s3_is_accounted_for(tmp_path):
    text = migrate(FIXTURES / "s3.yaml")
    assert 'dirpath="s3://digits-of-the-tests/first/checkpoints"' in text
    assert "async_save=True" not in text
    flat = " ".join(text.replace("#", "").split())
    assert "s3_checkpointing.enable_async_checkpointing (it was False) is ModelCheckpoint(async_save=)." in flat
    assert (
        "counterpart: max_write_concurrency (10), max_read_concurrency (15), chunk_size_MB (64). Files of more" in flat
    )
    assert "# Other sections of the file are not used here: name. Model" in text
    cfg = OmegaConf.load(FIXTURES / "s3.yaml")
    cfg.s3_checkpointing.enable_async_checkpointing = True
    OmegaConf.save(cfg, tmp_path / "c.yaml")
    assert "async_save=True" in migrate(tmp_path / "c.yaml")
    cfg.s3_checkpointing.enable_async_checkpointing = "${oc.env:GONE,false}"
    OmegaConf.save(cfg, tmp_path / "c.yaml")
    assert "async_save=True" not in migrate(tmp_path / "c.yaml")
    cfg.exp_manager.checkpoint_callback_params.dirpath = "elsewhere"
    OmegaConf.save(cfg, tmp_path / "c.yaml")
    text = migrate(tmp_path / "c.yaml")
    assert "async_save=True" not in text
    assert "s3_checkpointing has no effect: checkpoint_callback_params.dirpath is no URL" in text


def test_a_search_is_accounted_for(tmp_path):
    text = migrate(FIXTURES / "sweep.yaml")
    flat = " ".join(text.replace("#", "").split())
    for line in (
        "hydra.sweeper.params (model.optim.lr, model.encoder.dim, model.decoder.dropout) is not here: this file is one run",
        "call run() in a main(cfg) of yours that nl.hydra_runner decorates",
        "name is a constant here, whatever the values of model.optim.lr, model.encoder.dim, model.decoder.dropout.",
        "hydra.sweep, hydra.launcher are for Hydra, and read by what nl.hydra_runner decorates, not by this file.",
        "defaults is for Hydra, and read by",
        "Other sections of the file are not used here: name, model.",
    ):
        assert line in flat
    file = tmp_path / "c.yaml"
    file.write_text("defaults: [_self_, model: conformer]\nhydra: {run: {dir: x}}\nexp_manager: {name: n}\n")
    text = migrate(file)
    assert "defaults names other files, which are not read here: model: conformer." in text
    assert "hydra.run is for Hydra" in text
    assert "nl.hydra_runner decorates, and start" not in text


def test_a_migrated_search_gives_each_combination_a_directory(tmp_path, monkeypatch):
    """What the comment promises of run(), called for two combinations by what hydra_runner decorates."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(migrate(FIXTURES / "sweep.yaml"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for lr in ("0.01", "0.001"):
        job = nl.SweepJob(f"model.optim.lr={lr}", 0, (f"model.optim.lr={lr}",), tmp_path / lr)
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, job.dumps())
            patch.setenv(VERSION_VARIABLE, job.name)
            by_recipe(recipe, max_steps=2)
    assert [names(run) for run in Path("nemo_experiments").glob("digits*")] == [
        ["model.optim.lr=0.001", "model.optim.lr=0.01"]
    ]


def test_the_section_alone_will_do(tmp_path):
    file = tmp_path / "section.yaml"
    file.write_text("name: alone\nema: {enabled: true}\n")
    text = migrate(file)
    assert 'name="alone"' in text
    assert "EMA(" in text


def test_what_is_not_possible_is_left_out_and_said(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "exp_manager:\n  create_neptune_logger: true\n  neptune_logger_kwargs: {project: p}\n"
        "  checkpoint_callback_params: {save_last_n_optim_states: 2}\n"
    )
    text = migrate(file)
    assert "# What is NOT in this file, because it is not possible:" in text
    assert "create_neptune_logger cannot work: Neptune's service closed" in text
    assert "save_last_n_optim_states=2" in text
    compile(text, "recipe.py", "exec")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("exp_manager:\n  expdir: x\n", "full_key: expdir"),
        ("exp_manager:\n  name: ${gone}\n", "Interpolation key 'gone' not found"),
        ("exp_manager:\n  ema: {decay: slow}\n", "full_key: ema.decay"),
        ("model: {}\n", "has no section exp_manager (found: model)"),
        ("name: n\nmodel: {}\nexp_manger: {}\n", "has no section exp_manager (found: name, model, exp_manger)"),
        ("exp_manager: {version: '${now:%Y}'}\n", "give what it prints with --cfg job --resolve"),
        ("exp_manager: 3\n", "exp_manager is 3"),
        ("- a\n", "is no mapping"),
        ("a: [\n", "while parsing"),
        ("3\n", "c.yaml cannot be read as YAML: Invalid loaded object type: int"),
        ("exp_manager: {checkpoint_callback_params: {train_time_interval: soon}}\n", "train_time_interval='soon'"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, capsys, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert main([str(file), "--out", str(tmp_path / "recipe.py")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "recipe.py").exists()


def test_what_cannot_be_opened_is_said(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes("exp_manager: {name: für}".encode("latin-1"))
    assert main([str(tmp_path / "latin.yaml")]) == 2
    assert "latin.yaml cannot be read as YAML: 'utf-8' codec can't decode" in capsys.readouterr().err
    for out, why in ((tmp_path, "give a file in it"), (tmp_path / "latin.yaml" / "recipe.py", "is no directory")):
        assert main([str(FIXTURES / "resume.yaml"), "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"--out {out} cannot be written: ")
        assert why in error
    assert os.listdir(tmp_path) == ["latin.yaml"]


def test_a_file_that_is_not_there(capsys):
    assert main(["gone.yaml"]) == 2
    assert "there is no file gone.yaml" in capsys.readouterr().err
    with pytest.raises(NotFoundError):
        migrate("gone.yaml")


def test_without_out_it_goes_to_standard_output(capsys):
    assert main([str(FIXTURES / "resume.yaml")]) == 0
    assert "resume_if_exists=True" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("it's", '"it\'s"'), ('say "x"', "'say \"x\"'"), ("a\nb", '"a\\nb"'), (1.5, "1.5"), (float("inf"), 'float("inf")'),
        (None, "None"), (True, "True"), ([1, "a"], '[1, "a"]'), ({"a": [None]}, '{"a": [None]}'), ([], "[]"),
        (Name("signal", "SIGTERM"), "SIGTERM"), (Call(Name("nemologger", "AutoResume")), "nl.AutoResume()"),
    ],
)  # fmt: skip
def test_values_are_written_as_the_formatter_has_them(value, source):
    assert expression(value) == source


def test_what_cannot_be_written_is_refused():
    with pytest.raises(TypeError, match="cannot be written into a Python file"):
        expression(object())


def test_a_trainer_of_the_wrong_kind_is_an_error(tmp_path):
    """What the section of a logger says is refused by both, with the same words."""
    section = {"summary_writer_kwargs": {"log_dir": "x"}, "exp_dir": str(tmp_path)}
    with pytest.raises(ConfigurationError, match=r"summary_writer_kwargs\.log_dir cannot be set"):
        exp_manager(bare_trainer(), section)
    file = tmp_path / "c.yaml"
    OmegaConf.save({"exp_manager": section}, file)
    assert "summary_writer_kwargs.log_dir cannot be set" in migrate(file)
    assert os.listdir(tmp_path) == ["c.yaml"]
