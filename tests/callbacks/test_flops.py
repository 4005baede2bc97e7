"""Operations are those that a pencil counts, and counting them changes nothing."""

from __future__ import annotations

import logging
import math
import time

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._higher_order_ops.map import map as map_operator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy import BATCH, ToyModel, loader, quiet_trainer

from nemologger import ConfigurationError, ModelCheckpoint
from nemologger.callbacks import FLOPsMeasurement
from nemologger.callbacks import flops as flops_module
from nemologger.callbacks.flops import METRIC

# Two layers, 8 x 8 and 8 x 1: forward, the gradient of the weights, and for the second that of its input.
TOY = 2 * BATCH * (8 * 8 + 8) * 2 + 2 * BATCH * 8


class Attends(ToyModel):
    """Attention and dropout."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(self.attention(batch[None])[0], batch_idx)


class Values(pl.Callback):
    """What was logged, by step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_train_batch_start(self, trainer, *args):
        if METRIC in trainer.callback_metrics:
            self.values[trainer.global_step] = float(trainer.callback_metrics[METRIC])


def run(*callbacks, model=None, steps=8, **options):
    trainer = quiet_trainer(max_steps=steps, callbacks=list(callbacks), **{"enable_checkpointing": False, **options})
    model = model or ToyModel()
    torch.manual_seed(1)
    trainer.fit(model, loader(), loader())
    return trainer, model


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_has_the_operations_of_forward_and_backward(accumulate):
    flops = FLOPsMeasurement()
    run(flops, accumulate_grad_batches=accumulate, steps=2)
    assert flops.flops_per_batch == TOY


class Slow(pl.Callback):
    """Each batch takes so long, and validation much longer."""

    def __init__(self, pause: float) -> None:
        self.pause = pause

    def on_train_batch_start(self, *args):
        time.sleep(self.pause)

    def on_validation_start(self, *args):
        time.sleep(20 * self.pause)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_rate_is_that_of_the_wall_clock_without_validation(accumulate):
    pause = 0.1
    trainer, _ = run(
        FLOPsMeasurement(log_every_n_steps=4),
        Slow(pause),
        accumulate_grad_batches=accumulate,
        steps=8,
        val_check_interval=5,
    )
    assert float(trainer.callback_metrics[METRIC]) == pytest.approx(TOY / pause / 1e12)


def test_it_is_logged_when_it_is_due(tmp_path):
    logger = CSVLogger(tmp_path)
    run(FLOPsMeasurement(), values := Values(), logger=logger, log_every_n_steps=3, steps=8)
    assert min(values.values) == 3
    assert len(set(values.values.values())) == 2
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index(METRIC)
    assert sum(row.split(",")[column] != "" for row in rows[1:]) == 2


@pytest.mark.parametrize(("dropout", "products"), [(0.3, 2 + 4), (0.0, 2 + 5)])
def test_counting_changes_nothing(dropout, products):
    _, plain = run(model=Attends(dropout))
    counted = FLOPsMeasurement()
    _, model = run(counted, model=Attends(dropout))
    assert model.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    # Attention, forward and backward: products of 4 x 4 x 4 in each of 2 heads. The fused operator, which on the CPU is for
    # attention without dropout, makes one of them twice.
    attention = 2 * (4 * 4 * 4) * 2 * products
    projections = 2 * BATCH * (8 * 24 + 8 * 8 + 2 * 8 * 16) * 3 - 2 * BATCH * 8 * 24  # the input needs no gradient
    assert counted.flops_per_batch == TOY + 2 * BATCH * 8 * 8 + attention + projections


def test_a_resumed_run_counts_again_and_repeats_the_uninterrupted_one(tmp_path):
    def go(directory, steps, resume=None):
        flops = FLOPsMeasurement()
        save = ModelCheckpoint(dirpath=directory, filename="{step}", every_n_train_steps=2, monitor=None)
        trainer = quiet_trainer(max_steps=steps, callbacks=[flops, save])
        model = Attends()
        torch.manual_seed(1)
        trainer.fit(model, loader(), loader(), ckpt_path=resume)
        return flops, model

    _, whole = go(tmp_path / "a", 8)
    go(tmp_path / "b", 4)
    flops, rest = go(tmp_path / "b", 8, tmp_path / "b" / "step=4-last")
    assert flops.flops_per_batch > TOY
    assert {step: whole.losses[step] for step in rest.losses} == rest.losses
    assert min(rest.losses) == 4


class ByHand(ToyModel):
    """Optimizes by itself, with products of matrices in it, and leaves out a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.current_epoch == 0 else None

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization_and_a_batch_left_out():
    flops = FLOPsMeasurement()
    run(flops, model=ByHand(), steps=3)
    assert flops.flops_per_batch == TOY


def test_the_optimizer_is_not_counted():
    class Multiplies(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            torch.ones(64, 64) @ torch.ones(64, 64)
            return loss

    class Model(ToyModel):
        def configure_optimizers(self):
            return Multiplies(self.parameters(), lr=0.1)

    flops = FLOPsMeasurement()
    run(flops, model=Model(), steps=3)
    assert flops.flops_per_batch == TOY


def test_what_cannot_be_counted_is_said_and_does_not_stop_training(caplog, monkeypatch):
    def fails(*args, **kwargs):
        raise AssertionError("shapes are incompatible")

    monkeypatch.setattr(flops_module, "sdpa_flop_count", fails)
    flops = FLOPsMeasurement()
    with caplog.at_level(logging.WARNING):
        run(flops, model=Attends(0.0))
    assert (
        "flash_attention_for_cpu, which torch could not count: AssertionError: shapes are incompatible" in caplog.text
    )
    assert flops.flops_per_batch > TOY


class Nothing(ToyModel):
    """Adds, but multiplies no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(8))

    def training_step(self, batch, batch_idx):
        return (batch + self.one).sum()


def test_nothing_to_count_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        trainer, _ = run(FLOPsMeasurement(1), model=Nothing())
    assert "no operation of the first batch" in caplog.text
    assert METRIC not in trainer.callback_metrics


def test_a_compiled_model_is_left_alone(caplog):
    model = ToyModel()
    model.net.compile(backend="eager")
    with caplog.at_level(logging.WARNING):
        trainer, _ = run(FLOPsMeasurement(1), model=model)
    assert "the model is compiled" in caplog.text
    assert METRIC not in trainer.callback_metrics
    trainer, _ = run(FLOPsMeasurement(1, flops_per_batch=1e12), model=model)
    assert math.isfinite(trainer.callback_metrics[METRIC])
    assert trainer.callback_metrics[METRIC] > 0


class Maps(ToyModel):
    """Calls an operator that takes a function."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            torch.cond(batch.sum() > 1e9, lambda x: x + torch.rand(8), lambda x: x @ torch.rand(8, 8), (batch,))
        mapped = map_operator(lambda row: row * 2, batch)
        return super().training_step(mapped, batch_idx) + torch.rand(()) * 0


def test_operators_that_take_functions_run_as_ever_and_are_said_to_be_left_out(caplog):
    """FlopCounterMode would raise at the one, and run both branches of the other, random numbers included."""
    _, plain = run(model=Maps(), steps=2)
    flops = FLOPsMeasurement()
    with caplog.at_level(logging.WARNING):
        _, model = run(flops, model=Maps(), steps=2)
    assert model.losses == plain.losses
    assert flops.flops_per_batch == TOY
    for name in ("map", "cond"):
        assert f"leaves out the operator {name}" in caplog.text


class CompiledPart(ToyModel):
    """Its activation is compiled, it is not."""

    def __init__(self, backend) -> None:
        super().__init__()
        self.activation = torch.compile(lambda x: torch.relu(x) + 1, backend=backend)

    def training_step(self, batch, batch_idx):
        return super().training_step(self.activation(batch), batch_idx)


def test_a_compiled_function_is_compiled_all_the_same(caplog):
    """FlopCounterMode keeps it from ever being compiled in this process."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    flops = FLOPsMeasurement()
    with caplog.at_level(logging.WARNING):
        run(flops, model=CompiledPart(backend), steps=3)
    assert len(graphs) == 1
    assert flops.flops_per_batch == TOY
    assert "part of the first batch is compiled" in caplog.text


def test_products_inside_of_others_and_of_nested_tensors_are_counted():
    with torch.inference_mode(), flops_module._Counter() as counter:
        torch.ones(2, 3, 4) @ torch.ones(4, 5)
    assert counter.total == 2 * 2 * 3 * 4 * 5
    rows = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    weight = torch.ones(6, 4, requires_grad=True)
    with flops_module._Counter() as counter:
        product = nn.functional.linear(rows, weight)
        product.values().sum().backward()
    assert [part.shape for part in product.unbind()] == [(2, 6), (3, 6)]
    assert counter.total == 2 * (2 * 5 * 4 * 6)


def test_a_device_counts_its_own_part_of_sharded_products():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        parallelize_module(net, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
        with flops_module._Counter() as counter:
            net(torch.ones(4, 8)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert counter.total == (2 * 4 * 8 * 16) * (2 + 3) / 2


def test_an_exception_leaves_torch_as_it_was():
    class Fails(ToyModel):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    flops = FLOPsMeasurement()
    with pytest.raises(ZeroDivisionError):
        run(flops, model=Fails())
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert flops._counter is None


@pytest.mark.parametrize("wrong", [{"log_every_n_steps": 0}, {"flops_per_batch": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        FLOPsMeasurement(**wrong)


def test_an_interval_that_loggers_will_not_see_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(FLOPsMeasurement(2), logger=CSVLogger(tmp_path), log_every_n_steps=3, steps=1)
    assert "multiple of 3" in caplog.text


class Recurrent(ToyModel):
    """An LSTM in both directions, and then a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, bidirectional=True, batch_first=True)
        self.both = nn.Bilinear(32, 32, 1)

    def training_step(self, batch, batch_idx):
        last = self.lstm(batch[:, None].expand(-1, 5, -1))[0][:, -1]
        return self.both(last, last).sum()


def test_a_recurrent_network_is_counted_and_what_has_no_formula_is_said(caplog):
    """oneDNN runs a layer of an LSTM as one operator: its matrices are used forward, and twice backward."""
    flops = FLOPsMeasurement()
    run(flops, model=Recurrent(), steps=1)
    assert flops.flops_per_batch == 3 * 2 * (2 * BATCH * 5 * (4 * 16) * (8 + 16))
    assert "leaves out the operator aten._trilinear" in caplog.text
