"""Small checkpoints, made and found through the engine itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemologger.checkpoint.find import Found, newest, survey
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.state.snapshot import Snapshot, take
from nemologger.checkpoint.verify import problems
from nemologger.checkpoint.writing.plan import Planner
from nemologger.checkpoint.writing.saver import Saver
from nemologger.disk import Disk, LocalDisk
from nemologger.ranks import Ranks, SingleProcess


def lightning_state(step: int) -> dict[str, Any]:
    """A checkpoint as Lightning hands it over; every value tells the step."""
    weight = torch.full((3, 4), float(step))
    return {
        "epoch": 0,
        "global_step": step,
        "state_dict": {"layer.weight": weight, "layer.bias": torch.arange(3.0) + step, "count": torch.tensor(step)},
        "optimizer_states": [
            {
                "state": {
                    0: {"step": torch.tensor(float(step)), "exp_avg": weight * 2},
                    1: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(3) * step},
                },
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
            }
        ],
        "callbacks": {"ModelCheckpoint": {"consumed_samples": step * 8}},
    }


def snapshot_of(step: int) -> Snapshot:
    """The state of ``step``."""
    state = lightning_state(step)
    return take(state, frozenset({"layer.weight", "layer.bias"}), [{0: "layer.weight", 1: "layer.bias"}])


def save(
    checkpoint: Path,
    step: int,
    disk: Disk | None = None,
    ranks: Ranks | None = None,
    apart: bool = False,
    **manifest: Any,
) -> Manifest:
    """Save the state of ``step`` as ``checkpoint``, with a small context."""
    disk = disk or LocalDisk()

    def write_context(directory: Path) -> None:
        disk.make_directory(directory)
        disk.write(directory / "io.json", [b'{"step": %d}' % step])

    ranks = ranks or SingleProcess()
    saver = Saver(disk, ranks, Planner(ranks, apart=apart))
    return saver.save(snapshot_of(step), checkpoint, Manifest(step=step, epoch=0, **manifest), write_context)


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with the files of a checkpoint."""
    return [str(problem) for problem in problems(checkpoint)]


def newest_in(directory: Path) -> Found | None:
    """What a resume would take."""
    return newest(survey(directory), faults, lambda line: None)


def step_in(checkpoint: Path, *, thin: bool = False) -> int:
    """The step that every tensor of ``checkpoint``, which has no optimizer if ``thin``, tells; read back from its files."""
    loaded = load_checkpoint(checkpoint)
    step = loaded["global_step"]
    wanted = lightning_state(step)
    for name, tensor in wanted["state_dict"].items():
        assert torch.equal(loaded["state_dict"][name], tensor), name
    assert ("optimizer_states" in loaded) is not thin
    for number, state in wanted["optimizer_states"][0]["state"].items() if not thin else ():
        for field, tensor in state.items():
            assert torch.equal(loaded["optimizer_states"][0]["state"][number][field], tensor), (number, field)
    return int(step)


def names_in(directory: Path) -> set[str]:
    """Everything that lies in ``directory``, hidden files included."""
    return {path.name for path in directory.iterdir()}
