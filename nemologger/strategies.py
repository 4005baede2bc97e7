"""Lightning's strategies, with NeMo's names and options. Those of Lightning itself work as well."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import strategies as lightning_strategies
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from nemologger.condition import holds
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["DDPStrategy", "FSDP2Strategy", "FSDPStrategy", "ModelParallelStrategy"]

#: What a strategy calls instead of ``forward``.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class DDPStrategy(lightning_strategies.DDPStrategy):
    """Lightning's DDPStrategy.

    Args:
        *args: Lightning's.
        ckpt_async_save: Save beside training, as ``ModelCheckpoint(async_save=True)``.
        **kwargs: Lightning's.

    Example:
        >>> DDPStrategy(ckpt_async_save=True).ckpt_async_save
        True
    """

    def __init__(self, *args: Any, ckpt_async_save: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ckpt_async_save = ckpt_async_save


class FSDPStrategy(lightning_strategies.FSDPStrategy):
    """Lightning's FSDPStrategy. Checkpoints are written in shards, whatever its ``state_dict_type``.

    Args:
        *args: Lightning's.
        ckpt_async_save: Save beside training, as ``ModelCheckpoint(async_save=True)``.
        **kwargs: Lightning's.

    Example:
        >>> FSDPStrategy(sharding_strategy="SHARD_GRAD_OP").ckpt_async_save
        False
    """

    def __init__(self, *args: Any, ckpt_async_save: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ckpt_async_save = ckpt_async_save


class ModelParallelStrategy(lightning_strategies.ModelParallelStrategy):
    """Lightning's ModelParallelStrategy: the module shards itself, in ``configure_model``.

    Args:
        *args: Lightning's.
        ckpt_async_save: Save beside training, as ``ModelCheckpoint(async_save=True)``.
        **kwargs: Lightning's.

    Example:
        >>> ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1).ckpt_async_save
        False
    """

    def __init__(self, *args: Any, ckpt_async_save: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ckpt_async_save = ckpt_async_save


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, with tensor parallelism if wanted, for any LightningModule.

    A module that has a ``configure_model`` shards itself there, as with Lightning's ModelParallelStrategy. Any other is
    sharded here: first as ``tp_shard_plan`` says, then every element of its ``nn.ModuleList`` s (the blocks of a
    transformer) by itself, then the rest.

    Args:
        data_parallel_size: Over how many ranks parameters are sharded; each sees other data. ``"auto"`` takes all ranks that
            tensor parallelism leaves.
        tensor_parallel_size: Over how many ranks single layers are split; they see the same data. Default 1.
        tp_shard_plan: For tensor parallelism, how to split which submodule, by its name: what
            ``torch.distributed.tensor.parallel.parallelize_module`` takes.
        mp_policy: FSDP2's mixed precision.
        offload_policy: FSDP2's offloading to the CPU.
        ckpt_async_save: Save beside training, as ``ModelCheckpoint(async_save=True)``.
        **kwargs: Those of Lightning's ModelParallelStrategy.

    Raises:
        ConfigurationError: If sizes or plan cannot work; the sizes are compared with the number of ranks when training
            starts.

    Example:
        >>> strategy = FSDP2Strategy(data_parallel_size=4, ckpt_async_save=True)
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = 1,
        tp_shard_plan: Mapping[str, ParallelStyle] | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: CPUOffloadPolicy | None = None,
        ckpt_async_save: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and not holds(lambda ranks: index(ranks) >= 1, size):
                raise ConfigurationError(
                    f"FSDP2Strategy({name}={size!r}): expected a number of ranks from 1 on, or 'auto'"
                )
        if tp_shard_plan is not None and not isinstance(tp_shard_plan, Mapping):
            raise ConfigurationError(
                f"FSDP2Strategy(tp_shard_plan={tp_shard_plan!r}): expected how to split which submodule, by its name, for "
                "example {'mlp.up': ColwiseParallel()}"
            )
        super().__init__(data_parallel_size, tensor_parallel_size, ckpt_async_save=ckpt_async_save, **kwargs)
        self._tp_shard_plan = tp_shard_plan
        self._policies = {"mp_policy": mp_policy, "offload_policy": offload_policy}

    def setup_environment(self) -> None:
        """Settle what is ``"auto"``, and make the mesh of ranks."""
        world = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = 1
        if self._data_parallel_size == "auto":
            self._data_parallel_size = max(1, world // self._tensor_parallel_size)
        if self._data_parallel_size * self._tensor_parallel_size != world:
            raise ConfigurationError(
                f"FSDP2Strategy(data_parallel_size={self._data_parallel_size}, "
                f"tensor_parallel_size={self._tensor_parallel_size}): their product is the number of ranks, which is {world}"
            )
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Shard the module, unless it does so itself."""
        module = self.lightning_module
        if module is None or is_overridden("configure_model", module):
            super().setup(trainer)
            return
        self._shard(module)
        # Lightning wants to see a hook that has done it.
        vars(module)["configure_model"] = lambda: None
        try:
            super().setup(trainer)
        finally:
            del vars(module)["configure_model"]

    def _shard(self, module: pl.LightningModule) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
        from torch.distributed.tensor.parallel import parallelize_module

        if isinstance(module, FSDPModule):
            return  # by an earlier fit
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            if not self._tp_shard_plan:
                raise ConfigurationError(
                    f"FSDP2Strategy(tensor_parallel_size={mesh['tensor_parallel'].size()}): say how to split the layers "
                    "with tp_shard_plan={'submodule': ColwiseParallel(), ...}, or shard the module in its configure_model"
                )
            parallelize_module(module, mesh["tensor_parallel"], dict(self._tp_shard_plan))
        options: dict[str, Any] = {name: policy for name, policy in self._policies.items() if policy is not None}
        data = mesh["data_parallel"]
        for blocks in [found for found in module.modules() if isinstance(found, nn.ModuleList)]:
            for block in blocks:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=data, **options)
        fully_shard(module, mesh=data, **options)
        for step in _STEPS:
            register_fsdp_forward_method(module, step)
