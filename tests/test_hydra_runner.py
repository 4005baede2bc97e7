"""The decorator, for a single run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

from nemologger import ConfigurationError, hydra_runner

TOY = Path(__file__).with_name("sweep_toy.py")
SCHEMA = Path(__file__).with_name("sweep_schema.py")
CONF = Path(__file__).with_name("sweep_conf")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment(), capture_output=True, text=True, timeout=240
    )


def test_a_run_stays_where_it_is_and_hydra_writes_nothing():
    done = run(TOY, "train=false", f"diary={Path.cwd()}/diary.txt")
    assert done.returncode == 0, done.stderr
    assert Path("diary.txt").read_text() == f"None\t{os.getcwd()}\tNone\n"
    assert os.listdir() == ["diary.txt"]


def test_hydra_writes_what_it_is_asked_for():
    done = run(TOY, "train=false", "hydra.run.dir=out", "hydra.output_subdir=.hydra")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path("out", ".hydra").iterdir()) == [
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    ]


def test_what_the_configuration_asks_of_hydra_counts_too():
    Path("conf").mkdir()
    Path("conf/mine.yaml").write_text("hydra: {run: {dir: elsewhere}}\nname: mine\n")
    done = run(SCHEMA, "--config-path", Path("conf").absolute(), "--config-name", "mine")
    assert done.stdout == "name mine steps 3\n", done.stderr
    assert Path("elsewhere").is_dir()


def test_help_shows_the_configuration():
    done = run(TOY, "--help")
    assert done.returncode == 0
    assert "max_steps: 4" in done.stdout


def test_as_a_module():
    done = run("-m", "sweep_toy", "train=false")
    assert done.returncode == 0, done.stderr
    swept = run("-m", "sweep_toy", "-m", "train=false", "model.lr=1,2")
    assert swept.returncode == 0, swept.stderr
    assert "2 of 2 combinations are finished" in swept.stdout


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["name=x"], "name x steps 3"),  # there is no file of that name beside the script
        (["--config-path", CONF / "more", "steps=4"], "name of the file steps 4"),
        (["--config-path", CONF / "more", "steps=many"], "could not be converted to Integer"),
        (["--config-path", CONF / "more", "other=1"], "Could not override 'other'"),
        (["--config-name", "more/other"], "with a schema it must be a name without a directory"),
    ],
)
def test_a_schema_gives_defaults_and_types(arguments, output):
    done = run(SCHEMA, *arguments)
    assert output in done.stdout + done.stderr
    assert "deprecated" not in done.stderr


def test_a_configuration_may_be_given():
    @hydra_runner(config_path="conf", config_name="train")
    def main(cfg):
        """What it does."""
        return cfg["seed"]

    assert main({"seed": 3}) == 3
    assert main.__doc__ == "What it does."


def test_without_hydra_there_is_a_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'nemologger\[hydra\]'"):
        hydra_runner()(print)()
