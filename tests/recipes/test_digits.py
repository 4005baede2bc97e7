"""The recipe without fiddle."""

from __future__ import annotations

import os
from pathlib import Path

from processes import python
from toy import manifests, names

SCRIPT = Path(__file__).parents[2] / "recipes" / "digits.py"


def test_it_learns_and_goes_on(tmp_path):
    first = python(SCRIPT, "--dir", tmp_path, "--max-epochs", 2, light=False)
    second = python(SCRIPT, "--dir", tmp_path, "--max-epochs", 4, light=False)
    assert "best accuracy" in first.stdout
    assert "Restored all states" in second.stderr
    checkpoints = tmp_path / "digits" / "checkpoints"
    saved = manifests(checkpoints)
    assert max(m.epochs_done for m in saved.values()) == 4
    ranked = {m.step: m.score for m in saved.values() if m.ranked}
    assert max(ranked.values()) > 0.7
    last = next(name for name in names(checkpoints) if name.endswith("-last"))
    assert os.readlink(checkpoints / last) == last.removesuffix("-last")
