"""Whether Lightning hands on what is loaded as it is."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from toy import ToyModel, quiet_trainer

from nemologger import lightning_port


@pytest.mark.parametrize("overrides", [False, True])
def test_whether_other_keys_may_be_loaded(overrides):
    class Migrates(ToyModel):
        def on_load_checkpoint(self, checkpoint):
            pass

    module = Migrates() if overrides else ToyModel()
    assert lightning_port.will_rewrite_state(module) is overrides
    module.strict_loading = False
    assert lightning_port.will_rewrite_state(module)


class _LooksAtCheckpoints(pl.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pass


class _Ours(ModelCheckpoint):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pass


_Ours.on_load_checkpoint.__module__ = "nemologger.somewhere"


class _OwnStrategy(SingleDeviceStrategy):
    def load_model_state_dict(self, checkpoint, strict=True):
        super().load_model_state_dict(checkpoint, strict)


class _OwnPrecision(Precision):
    def on_load_checkpoint(self, checkpoint):
        pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"strategy": "ddp", "devices": 2}, True),
        ({"callbacks": [pl.Callback(), ModelCheckpoint(), _Ours()]}, True),
        ({"callbacks": [_LooksAtCheckpoints()]}, False),
        ({"callbacks": [WeightAveraging()]}, False),
        ({"strategy": _OwnStrategy(device="cpu")}, False),
        ({"strategy": ModelParallelStrategy(), "devices": 2}, False),
        ({"plugins": [_OwnPrecision()]}, False),
    ],
)
def test_whether_somebody_else_sees_what_is_loaded(options, expected):
    trainer = quiet_trainer(**options)
    assert lightning_port.loads_as_is(trainer, None) is expected
    assert lightning_port.loads_as_is(trainer, ToyModel()) is expected
    model = ToyModel()
    model.strict_loading = False
    assert not lightning_port.loads_as_is(trainer, model)


def test_a_hook_that_was_put_on_an_object_counts():
    trainer = quiet_trainer(callbacks=[pl.Callback()])
    assert lightning_port.loads_as_is(trainer, None)
    trainer.strategy.load_model_state_dict = lambda checkpoint, strict=True: None
    assert not lightning_port.loads_as_is(trainer, None)
