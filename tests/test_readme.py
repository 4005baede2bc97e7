"""The README is true: its Python runs and gives its tree, and what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

from toy import ToyDataModule, ToyModel, names

import nemologger as nl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_ten_lines_write_its_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code.replace("1000", "200"), {"model": ToyModel(), "data": ToyDataModule()})  # the README's own code
    run = tmp_path / "nemo_experiments" / "my_model"
    checkpoints = names(run / "checkpoints")
    assert len(checkpoints) == 3
    assert checkpoints[-1].startswith("my_model--val_loss=") or checkpoints[0].startswith("my_model--val_loss=")
    assert len([name for name in checkpoints if name.endswith("-last")]) == 1
    tree = re.search(r"```\n(nemo_experiments.*?)```", README, re.DOTALL)[1]
    for name in ("cmd-args.log", "git-info.log", "nemo_error_log.txt", "lightning_logs.txt"):
        assert name in tree
    shown = set(re.findall(r"[\w-]+\.(?:log|txt|yaml|out)", tree))
    assert shown >= {re.sub(r"\.tfevents.*", "", path.name) for path in run.iterdir() if path.is_file()}


def test_what_it_links_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_names_it_uses_are_public():
    used = set(re.findall(r"\bnl\.(\w+)", README)) - {"MegatronStrategy"}
    assert used <= set(nl.__all__)
