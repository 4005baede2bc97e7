"""The steps that were asked for are profiled, and the files are there."""

from __future__ import annotations

import csv
import gc
import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from toy import ToyDataModule, ToyModel, loader, names, quiet_trainer

import nemologger as nl
from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.callbacks import MemoryProfileCallback, NsysCallback
from nemologger.callbacks.profile_window import ProfileWindow


class Window(ProfileWindow):
    """Notes when it is open."""

    def __init__(self, start: int, end: int, ranks=()) -> None:
        super().__init__(start, end, ranks)
        self.ranges: list[list[int]] = []
        self.batches = 0
        self.open = False

    def begin(self, trainer):
        self.ranges.append([trainer.global_step])
        self.open = True

    def end(self, trainer):
        self.ranges[-1].append(trainer.global_step)
        self.open = False


def run(*callbacks, steps=8, model=None, resume=None, **options):
    trainer = quiet_trainer(max_steps=steps, callbacks=list(callbacks), **{"enable_checkpointing": False, **options})
    model = model or ToyModel()
    trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return trainer, model


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 2, [[0, 2]]), (3, 5, [[3, 5]]), (3, 3, [[3, 4]]), (6, 99, [[6, 8]]), (8, 9, [])],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_range(start, end, expected, accumulate):
    run(window := Window(start, end), accumulate_grad_batches=accumulate)
    assert window.ranges == expected
    assert not window.open


def test_a_resumed_run_profiles_what_is_left(tmp_path):
    def go(window, steps, resume=None):
        save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, monitor=None, save_top_k=-1)
        run(window, save, steps=steps, resume=resume, enable_checkpointing=True)
        return window.ranges

    assert go(Window(3, 7), 4) == [[3, 4]]
    assert go(Window(3, 7), 8, tmp_path / "step=4") == [[4, 7]]
    assert go(Window(3, 7), 10, tmp_path / "step=8") == []


def test_ranks():
    run(window := Window(0, 1, [0]))
    assert window.ranges == [[0, 1]]
    with pytest.raises(ConfigurationError, match="there is no rank 1, the run has 1"):
        run(Window(0, 1, [1]))


@pytest.mark.parametrize(("start", "end", "ranks"), [(-1, 2, []), (3, 2, []), (0, 1, [-1])])
def test_wrong_arguments(start, end, ranks):
    with pytest.raises(ConfigurationError, match="count from 0"):
        Window(start, end, ranks)


def test_nsys_needs_cuda():
    assert NsysCallback(1, 2).gen_shape is False
    with pytest.raises(ConfigurationError, match="NsysCallback needs CUDA, this trainer runs on cpu"):
        run(NsysCallback(start_step=1, end_step=2))
    trainer = quiet_trainer(callbacks=[NsysCallback(1, 2)], enable_checkpointing=False)
    trainer.validate(ToyModel(), loader(), verbose=False)  # nothing to record, nothing to refuse


def test_the_history_of_cuda_needs_cuda(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cuda_history=True\) needs CUDA, this trainer runs on cpu"):
        run(MemoryProfileCallback(tmp_path, cuda_history=True))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_the_steps_and_a_timeline_of_memory(tmp_path):
    _, plain = run()
    _, model = run(MemoryProfileCallback(tmp_path, start_step=2, end_step=4))
    assert model.losses == plain.losses
    assert names(tmp_path) == ["rank0-steps2-4.memory.csv", "rank0-steps2-4.trace.json.gz"]
    events = json.loads(gzip.decompress((tmp_path / "rank0-steps2-4.trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::mse_loss" or event["name"] == "aten::addmm" for event in events) == 4
    rows = list(csv.DictReader((tmp_path / "rank0-steps2-4.memory.csv").open()))
    assert rows[0].keys() == {"microseconds", "device", "bytes", "allocated"}
    assert {row["device"] for row in rows} == {"cpu"}
    moments = [float(row["microseconds"]) for row in rows]
    assert moments == sorted(moments)
    assert any(int(row["bytes"]) < 0 for row in rows)
    held = int(rows[0]["allocated"]) - int(rows[0]["bytes"])  # what others had before
    for row in rows:
        held += int(row["bytes"])
        assert int(row["allocated"]) == held


@pytest.mark.filterwarnings("ignore")
def test_the_run_directory_and_an_exception(tmp_path):
    class Fails(ToyModel):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(max_steps=8, callbacks=[MemoryProfileCallback(end_step=6)])
    with pytest.raises(ZeroDivisionError):
        nl.train(Fails(), ToyDataModule(), trainer, nl.NeMoLogger(name="toy", log_dir=tmp_path), None)
    run_directory = Path(nl.run_of(trainer).log_dir)
    assert names(run_directory / "memory_profile") == ["rank0-steps0-2.memory.csv", "rank0-steps0-2.trace.json.gz"]
    assert gc.isenabled()


class Cycles(ToyModel):
    """Forgets a tensor in a cycle at step 2."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            knot: list = [torch.zeros(5, 7)]
            knot.append(knot)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warn", [True, False])
def test_cycles_are_said(tmp_path, caplog, warn):
    with caplog.at_level(logging.WARNING):
        run(MemoryProfileCallback(tmp_path, warn_cycles=warn, end_step=4), model=Cycles())
    said = [r.getMessage() for r in caplog.records if r.name.endswith("memory_profile")]
    assert len(said) == warn
    if warn:
        assert said[0].startswith(
            "rank 0, step 3: 1 tensors (0.00014 MB; torch.float32 [5, 7]) were in reference cycles of list"
        )
    assert gc.isenabled()
    assert gc.garbage == []
    assert gc.get_debug() == 0
