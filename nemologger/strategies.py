"""Lightning's strategies, with NeMo's names and options. Those of Lightning itself work as well."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from inspect import signature, unwrap
from itertools import product
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import strategies as lightning_strategies
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nemologger.condition import holds, unexpected
from nemologger.errors import ConfigurationError
from nemologger.exact.reach.code import names_in

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor.parallel import ParallelStyle

log = logging.getLogger(__name__)

__all__ = ["DDPStrategy", "FSDP2Strategy", "FSDPStrategy", "ModelParallelStrategy"]

#: What a strategy calls instead of ``forward``.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

#: Where a module may average gradients itself, for all that is known of it,
_AFTER_BACKWARD = ("on_after_backward", "on_before_optimizer_step")
#: unless it is there to log something; and where it does so if it calls such a thing.
_LOGS = {"log", "log_dict", "logger", "loggers", "print"}
_AROUND_BACKWARD = (*_AFTER_BACKWARD, "backward", "configure_gradient_clipping", "optimizer_step")
_AVERAGES = {"all_reduce", "all_reduce_coalesced", "reduce"}

_NAMED = 3


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

    A module may shard itself in ``configure_model``, as with Lightning's ModelParallelStrategy; parameters to train that it
    leaves whole are sharded here, unless it may average their gradients itself, as far as its code and hooks of theirs
    tell. One that shards nothing is sharded here: first as ``tp_shard_plan`` says, then every element of its
    ``nn.ModuleList`` s (the blocks of a transformer) by itself, then the rest. A ModuleList inside of such a block is
    sharded with it, and a block that has a parameter in common with other parts of the module is left to the rest. All
    ranks must call the same blocks in every step. Ranks that split layers between them must see the same data and draw the
    same random numbers: ``lightning.seed_everything`` sees to that.

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
        theirs = signature(lightning_strategies.ModelParallelStrategy).parameters
        for name in kwargs.keys() - theirs.keys():
            raise unexpected("FSDP2Strategy", name, [*signature(FSDP2Strategy).parameters, *theirs])
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
        try:
            # Lightning's launchers do so, and this strategy has none where others have started the processes.
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)  # type: ignore[union-attr]
        except ValueError as error:
            raise ConfigurationError(
                f"FSDP2Strategy: {error} Where torchrun starts any number of nodes, give "
                'Trainer(num_nodes=int(os.environ["GROUP_WORLD_SIZE"]))'
            ) from error
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
        """Shard the module, unless it has done so itself."""
        module = self.lightning_module
        self._clip_over_all_meshes()
        if module is None:
            super().setup(trainer)
            return
        if is_overridden("configure_model", module) and _is_sharded(module):
            self._shard_rest(module, trains=trainer.state.fn == TrainerFn.FITTING)
            super().setup(trainer)
            return
        if is_overridden("configure_model", module) and trainer.is_global_zero:
            log.info("configure_model() of %s shards nothing: FSDP2Strategy shards it", type(module).__name__)
        self._shard(module)
        # Lightning wants to see a hook that has done it.
        vars(module)["configure_model"] = lambda: None
        try:
            super().setup(trainer)
        finally:
            del vars(module)["configure_model"]

    def _shard(self, module: pl.LightningModule) -> None:
        if isinstance(module, FSDPModule):
            return  # by an earlier fit
        if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
            raise ConfigurationError(
                f"FSDP2Strategy: {lazy[0]} of {type(module).__name__} has no size before its layer is first called, and "
                "cannot be sharded. Give the layer its size (Linear instead of LazyLinear), or call it in configure_model()"
            )
        mesh = self.device_mesh
        tied = _tied(module)
        if mesh["tensor_parallel"].size() > 1:
            if not self._tp_shard_plan:
                raise ConfigurationError(
                    f"FSDP2Strategy(tensor_parallel_size={mesh['tensor_parallel'].size()}): say how to split the layers "
                    "with tp_shard_plan={'submodule': ColwiseParallel(), ...}, or shard the module in its configure_model"
                )
            parallelize_module(module, mesh["tensor_parallel"], dict(self._tp_shard_plan))
        for block in blocks_of(module):
            fully_shard(block, mesh=mesh["data_parallel"], **self._options())
        self._shard_root(module)
        if untied := [names for names in tied if len({id(module.get_parameter(name)) for name in names}) > 1]:
            raise ConfigurationError(
                f"tp_shard_plan makes several parameters of one that {' and '.join(untied[0])} have in common: shard the "
                "module in its configure_model, and tie them again there"
            )

    def _shard_rest(self, module: pl.LightningModule, *, trains: bool) -> None:
        """Shard what ``configure_model`` has left whole: nobody would exchange its gradients. Name what must stay so."""
        mesh = self.device_mesh
        if mesh["data_parallel"].size() == 1:
            return
        whole = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
            and (not isinstance(parameter, DTensor) or parameter.device_mesh == mesh["tensor_parallel"])
        }
        inside = {id(p) for part in module.modules() if isinstance(part, FSDPModule) for p in part.parameters()}
        # Those inside are its ignored_params, and FSDP2 knows no hooks, and no parameters without dimensions, or with none
        # yet.
        rest = {
            name: parameter
            for name, parameter in whole.items()
            if id(parameter) not in inside and not is_lazy(parameter) and parameter.dim() and not _has_hooks(parameter)
        }
        kind = type(module).__name__
        if rest and not _may_average(module):
            self._shard_root(module, ignored_params=set(module.parameters()) - set(rest.values()))
            whole = {name: parameter for name, parameter in whole.items() if name not in rest}
            if self.is_global_zero:
                log.info("configure_model() of %s shards a part of it: FSDP2Strategy shards the rest", kind)
        if whole and trains and self.is_global_zero:
            log.warning(
                "configure_model() of %s leaves %s whole: each rank trains its own, unless the module averages their "
                "gradients itself. What has dimensions is sharded by fully_shard(self) at the end of configure_model()",
                kind,
                ", ".join(list(whole)[:_NAMED]) + (f" and {len(whole) - _NAMED} more" if len(whole) > _NAMED else ""),
            )

    def _shard_root(self, module: pl.LightningModule, **options: Any) -> None:
        fully_shard(module, mesh=self.device_mesh["data_parallel"], **self._options(), **options)
        for step in _STEPS:
            register_fsdp_forward_method(module, step)

    def _options(self) -> dict[str, Any]:
        return {name: policy for name, policy in self._policies.items() if policy is not None}

    def _clip_over_all_meshes(self) -> None:
        """Let gradients be clipped by their norm where tensor parallelism splits only some of the parameters.

        torch takes the norm of gradients of one mesh of ranks only.
        """
        plugin = self.precision_plugin
        of_one_mesh = type(plugin).clip_grad_by_norm

        def clip(optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
            meshes: dict[Any, list[torch.Tensor]] = {}
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
            if len(meshes) <= 1:
                of_one_mesh(plugin, optimizer, clip_val)
                return
            norms = [
                get_total_norm([p.grad for p in parameters if p.grad is not None]) for parameters in meshes.values()
            ]
            whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
            total = torch.linalg.vector_norm(torch.stack(whole))
            for parameters in meshes.values():
                clip_grads_with_norm_(parameters, clip_val, total)

        vars(plugin)["clip_grad_by_norm"] = clip

    def model_to_device(self) -> None:
        """Move the module to its device; what ``offload_policy`` keeps on the CPU stays there."""
        if self._policies["offload_policy"] is None or not isinstance(self.model, FSDPModule):
            super().model_to_device()


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _has_hooks(parameter: nn.Parameter) -> bool:
    return any(getattr(parameter, hooks, None) for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def _may_average(module: pl.LightningModule) -> bool:
    """Whether ``module`` may average gradients itself, by the names in its code."""
    hooks = _AROUND_BACKWARD if module.automatic_optimization else (*_AROUND_BACKWARD, "training_step")
    own = [vars(kind) for kind in type(module).__mro__ if kind not in LightningModule.__mro__]
    for attributes, hook in product([vars(module), *own], hooks):
        if hook in attributes:
            code = getattr(unwrap(attributes[hook]), "__code__", None)
            names = set() if code is None else set(names_in(code))
            if names & _AVERAGES or (hook in _AFTER_BACKWARD and not names & _LOGS):
                return True
    return False


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of parameters that are one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ModuleLists that share neither parameters nor submodules with the rest of ``module``.

    Example:
        >>> block, head = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> module = nn.ModuleDict({"blocks": nn.ModuleList([block, nn.Linear(2, 2)]), "head": head})
        >>> len(blocks_of(module))
        2
        >>> head.weight = block.weight
        >>> len(blocks_of(module))
        1
    """
    parents: dict[int, set[int]] = {}  # of each submodule and parameter, the modules that have it
    for parent in module.modules():
        for held in (*parent.children(), *parent.parameters(recurse=False)):
            parents.setdefault(id(held), set()).add(id(parent))

    def stands_alone(block: nn.Module) -> bool:
        inside = {id(part) for part in block.modules()}
        held = [id(part) for part in (*block.modules(), *block.parameters()) if part is not block]
        return all(parents[part] <= inside for part in held)

    def walk(parent: nn.Module) -> Iterator[nn.Module]:
        for child in parent.children():
            is_block = isinstance(parent, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if not is_block:
                yield from walk(child)
            elif any(True for _ in child.parameters()) and stands_alone(child):
                yield child

    return list({id(block): block for block in walk(module)}.values())
