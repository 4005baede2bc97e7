"""The strategies with NeMo's names: what they refuse, and that they shard a module that does not shard itself."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from toy import ToyModel, loader, quiet_trainer

from nemologger import ModelCheckpoint
from nemologger.errors import ConfigurationError
from nemologger.strategies import DDPStrategy, FSDP2Strategy, FSDPStrategy, ModelParallelStrategy


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process, if Lightning makes one, is taken down again, with what it left in the environment."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.mark.parametrize("argument", ["data_parallel_size", "tensor_parallel_size"])
def test_a_size_is_a_number_of_ranks(argument):
    with pytest.raises(ConfigurationError, match=f"{argument}=0.*from 1 on, or 'auto'"):
        FSDP2Strategy(**{argument: 0})


def test_sizes_are_compared_with_the_number_of_ranks_before_training():
    trainer = quiet_trainer(max_steps=1, strategy=FSDP2Strategy(data_parallel_size=2))
    with pytest.raises(ConfigurationError, match=r"data_parallel_size=2, tensor_parallel_size=1.*which is 1"):
        trainer.fit(ToyModel(), loader())


def test_ranks_that_somebody_else_has_started_are_counted(monkeypatch):
    """torchrun, once a node is gone: "auto" would take the ranks that the Trainer is told of."""
    trainer = quiet_trainer(max_steps=1, strategy=FSDP2Strategy())
    monkeypatch.setattr(trainer.strategy, "cluster_environment", TorchElasticEnvironment())
    monkeypatch.setattr(trainer.strategy, "num_nodes", 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigurationError, match=r"num_nodes=2.*world size \(1\).*GROUP_WORLD_SIZE"):
        trainer.strategy.setup_environment()


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, ModelParallelStrategy, FSDP2Strategy])
def test_async_saving_is_an_option_of_every_strategy(kind):
    assert kind(ckpt_async_save=True).ckpt_async_save
    assert not kind().ckpt_async_save


def test_the_strategys_option_is_the_callbacks(tmp_path):
    ckpt = ModelCheckpoint(monitor=None, dirpath=tmp_path, every_n_train_steps=1)
    trainer = quiet_trainer(max_steps=2, strategy=DDPStrategy(ckpt_async_save=True), callbacks=[ckpt])
    trainer.fit(ToyModel(), loader())
    assert ckpt.async_save
    assert ckpt.best_model_path


def test_a_module_that_does_not_shard_itself_is_left_as_it_was_written(tmp_path):
    """FSDP2 on one rank: the module gets no hook of its own, and the class says what it was."""
    model = ToyModel()
    trainer = quiet_trainer(max_steps=2, strategy=FSDP2Strategy(), limit_val_batches=0)
    trainer.fit(model, loader())
    assert "configure_model" not in vars(model)
    assert isinstance(model, ToyModel)
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())


class _BuildsLate(ToyModel):
    """Its ``configure_model`` makes a layer, as Lightning suggests for large models, and shards nothing."""

    def configure_model(self):
        self.net[2] = torch.nn.Linear(8, 1)


def test_a_module_whose_own_hook_shards_nothing_is_sharded_here(caplog):
    """Each rank would train a model of its own, without a word. One that exchanges gradients itself is told."""
    caplog.set_level("INFO", "nemologger")
    model = _BuildsLate()
    trainer = quiet_trainer(max_steps=2, strategy=FSDP2Strategy(), limit_val_batches=0)
    trainer.fit(model, loader())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert "configure_model" not in vars(model)
    assert "configure_model() of _BuildsLate shards nothing" in caplog.text


def test_a_layer_without_a_size_is_named():
    """Before that, torch says something of ``load_state_dict``."""
    model = ToyModel()
    model.net[2] = torch.nn.LazyLinear(1)
    trainer = quiet_trainer(max_steps=2, strategy=FSDP2Strategy(), limit_val_batches=0)
    with pytest.raises(ConfigurationError, match=r"net\.2\.weight of ToyModel has no size"):
        trainer.fit(model, loader())


def test_what_the_offload_policy_keeps_on_the_cpu_stays_there():
    """The device has no values: moving the module to it would lose them."""
    strategy = FSDP2Strategy(offload_policy=CPUOffloadPolicy(pin_memory=False))
    trainer = quiet_trainer(max_steps=1, strategy=strategy, limit_val_batches=0)
    trainer.fit(ToyModel(), loader())
    strategy.parallel_devices = [torch.device("meta")]
    strategy.model_to_device()
    assert {parameter.device.type for parameter in strategy.model.parameters()} == {"cpu"}
