"""The order of gradients is played to DDP as it runs on a GPU: with a list of devices."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemologger.exact import reduction


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("on_devices", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_play(alone, on_devices, compiled):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if compiled:  # Lightning puts what it compiled beside the method
        module.forward = own = module.forward
    model = DistributedDataParallel(module)
    if on_devices:
        model.device_ids = [0]
    order = [name for name, _ in module.named_parameters()][::-1]
    seen = reduction.GradientOrder(model)
    reduction.play(model, order)
    assert seen.settle() == order
    assert all(parameter.grad is None for parameter in module.parameters())
    assert vars(module).get("forward") is (own if compiled else None)
    model(torch.ones(1, 3)).sum().backward()
    assert torch.equal(module[1].bias.grad, torch.ones(2))
