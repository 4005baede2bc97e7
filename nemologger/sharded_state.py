"""The live state of a model whose parameters are sharded: FSDP2 and tensor parallelism, and FSDP.

Lightning's strategies for them gather it, or copy it to the CPU, to save it, and read only their own checkpoints. Here the
tensors stay where they are, under the names that they have without any sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from nemologger.checkpoint.shards import is_sharded, part_here, sharded_like

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

#: What wrappers put into the names of parameters, and leave out of state dictionaries.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

Template = Callable[[str, tuple[int, ...]], "torch.Tensor | None"]


def shards_state(strategy: Strategy) -> bool:
    """Whether ``strategy`` may shard parameters, and restores them by itself."""
    return isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """The live state dictionary of the model. Collective with FSDP."""
    if isinstance(strategy, FSDPStrategy) and isinstance(strategy.model, FullyShardedDataParallel):
        with _in_shards(strategy.model):
            return dict(strategy.model.state_dict())
    module = strategy.lightning_module
    return {} if module is None else dict(module.state_dict())


@contextmanager
def kept_in_place(strategy: Strategy) -> Iterator[None]:
    """While it lasts, ``strategy`` hands over the live tensors of model and optimizers when a checkpoint is made."""
    if not shards_state(strategy):
        yield
        return
    mine: dict[str, Any] = {
        "lightning_module_state_dict": lambda: model_state(strategy),
        "optimizer_state": lambda optimizer: _optimizer_state(strategy, optimizer),
    }
    vars(strategy).update(mine)
    try:
        yield
    finally:
        for name in mine:
            vars(strategy).pop(name)


def templates(strategy: Strategy) -> Template:
    """For a flat key of a checkpoint and the size of its tensor, the live tensor that it is to be sharded like."""
    state = {name: tensor for name, tensor in model_state(strategy).items() if is_sharded(tensor)}

    def template(key: str, sizes: tuple[int, ...]) -> torch.Tensor | None:
        kind, _, name = key.partition(".")
        if kind == "optimizer":  # optimizer.<i>.state.<parameter>.<field>
            name = name.split(".", 2)[-1]
            if name.endswith(".step"):
                return None  # a number, also where the parameter is one
            while name and name not in state:
                name = name.rpartition(".")[0]
        tensor = state.get(name)
        return tensor if tensor is not None and tuple(tensor.shape) == sizes else None

    return template


def load_model(strategy: Strategy, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a model's state dictionary that was read for :func:`templates`.

    Args:
        strategy: Whose model; it may not be sharded yet.
        state: The state dictionary.
        strict: Whether the names must be the same.
    """
    if isinstance(strategy, FSDPStrategy) and isinstance(strategy.model, FullyShardedDataParallel):
        with _in_shards(strategy.model):
            strategy.model.load_state_dict(dict(state), strict=strict)
    elif strategy.lightning_module is not None:
        strategy.lightning_module.load_state_dict(state, strict=strict)


def load_optimizers(
    strategy: Strategy,
    states: Sequence[Mapping[str, Any]],
    optimizers: Sequence[torch.optim.Optimizer],
    names: Sequence[Mapping[int, str]],
) -> None:
    """Load optimizers' states that were read for :func:`templates`.

    Args:
        strategy: Whose optimizers.
        states: In the order of ``optimizers``.
        optimizers: Those of the trainer.
        names: For each of them, the parameter name behind each index.
    """
    for optimizer, state, name_of in zip(optimizers, states, names, strict=False):
        if isinstance(strategy, FSDPStrategy) and isinstance(strategy.model, FullyShardedDataParallel):
            with _in_shards(strategy.model):
                state = FullyShardedDataParallel.optim_state_dict_to_load(
                    strategy.model, optimizer, _by_name(state, name_of)
                )
        optimizer.load_state_dict(dict(state))


def scatter(strategy: Strategy, checkpoint: Mapping[str, Any], names: Sequence[Mapping[int, str]]) -> dict[str, Any]:
    """Lightning's dictionary with every tensor whole, as if it had been read for :func:`templates`.

    Args:
        strategy: Whose model it is for.
        checkpoint: The dictionary.
        names: For each optimizer, the parameter name behind each index.
    """
    template = templates(strategy)

    def part(value: Any, key: str) -> Any:
        like = template(key, tuple(value.shape)) if isinstance(value, torch.Tensor) else None
        return value if like is None else sharded_like(part_here(value, like, key), like)

    scattered = dict(checkpoint)
    if "state_dict" in checkpoint:
        scattered["state_dict"] = {name: part(v, f"state_dict.{name}") for name, v in checkpoint["state_dict"].items()}
    if "optimizer_states" in checkpoint:
        scattered["optimizer_states"] = [
            {
                **state,
                "state": {
                    number: {
                        field: part(v, f"optimizer.0.state.{name_of.get(number)}.{field}") for field, v in one.items()
                    }
                    for number, one in state["state"].items()
                },
            }
            for state, name_of in zip(checkpoint["optimizer_states"], names, strict=False)
        ]
    return scattered


def _optimizer_state(strategy: Strategy, optimizer: Any) -> dict[str, Any]:
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    if not (isinstance(strategy, FSDPStrategy) and isinstance(strategy.model, FullyShardedDataParallel)):
        state: dict[str, Any] = optimizer.state_dict()
        return state
    with _in_shards(strategy.model):
        named = FullyShardedDataParallel.optim_state_dict(strategy.model, optimizer)
    numbers: dict[str, int] = {}
    for group in named["param_groups"]:
        for name in group["params"]:
            numbers.setdefault(name, len(numbers))
    return {
        "state": {
            numbers[name]: fields for name, fields in sorted(named["state"].items(), key=lambda i: numbers[i[0]])
        },
        "param_groups": [{**group, "params": [numbers[n] for n in group["params"]]} for group in named["param_groups"]],
    }


def _by_name(state: Mapping[str, Any], name_of: Mapping[int, str]) -> dict[str, Any]:
    return {
        "state": {name_of[number]: fields for number, fields in state["state"].items()},
        "param_groups": [{**group, "params": [name_of[n] for n in group["params"]]} for group in state["param_groups"]],
    }


@contextmanager
def _in_shards(model: torch.nn.Module) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that FSDP's own tensors are deprecated
        with FullyShardedDataParallel.state_dict_type(
            model,
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        ):
            yield
