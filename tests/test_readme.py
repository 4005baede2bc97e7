"""The README is true: its Python runs and gives its tree, and what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import OmegaConf
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
    headings = {"#" + title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", README, re.MULTILINE)}
    missing = [link for link in links if link not in headings and not (ROOT / link).exists()]
    assert not missing


def test_the_names_it_uses_are_public():
    used = set(re.findall(r"\bnl\.(\w+)", README)) - {"MegatronStrategy", "FSDP2Strategy"}  # NeMo's
    assert used <= set(nl.__all__)


def test_its_other_python_runs(tmp_path, monkeypatch):
    """All blocks after the first, in order, in one program; the sizes of a toy in the place of its own."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1:]
    blocks = [block for block in blocks if "LightningCLI" not in block]  # it wants a command line, and jsonargparse
    settings = {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    cfg = OmegaConf.create({"trainer": settings, "exp_manager": {"exp_dir": str(tmp_path / "runs")}})
    names_of = {"nl": nl, "cfg": cfg, "model": ToyModel(), "data": ToyDataModule()}
    assert len(blocks) == 6
    for code in blocks:
        exec(code, names_of)
    assert len(names(tmp_path / "runs" / "default")) == 1
    assert list((tmp_path / "runs").rglob("*-last/manifest.json"))
