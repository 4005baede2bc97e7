"""The live state of a model whose parameters are sharded: FSDP2 and tensor parallelism, and FSDP.

Lightning's strategies for them gather it, or copy it to the CPU, to save it, and read only their own checkpoints. Here the
tensors stay where they are, under the names that they have without any sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

from nemologger.checkpoint.state.shards import is_sharded, part_here, sharded_like

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


def flattened(strategy: Strategy) -> FullyShardedDataParallel | None:
    """The model as FSDP has wrapped it: each rank holds a run of all elements in a row, not blocks of single parameters."""
    wrapped = strategy.model if isinstance(strategy, FSDPStrategy) else None
    return wrapped if isinstance(wrapped, FullyShardedDataParallel) else None


def parameters(strategy: Strategy) -> dict[str, torch.nn.Parameter]:
    """The parameters by plain name, as an optimizer sees them: of those that are sharded, this rank's part."""
    reshard(strategy)
    module = strategy.lightning_module
    return {} if module is None else {plain_name(name): parameter for name, parameter in module.named_parameters()}


def reshard(strategy: Strategy) -> None:
    """Drop what was put together of parameters for a forward, as a backward does.

    A forward without one leaves some of it, and the next forward would use that, whatever the shards have become since.
    """
    wrapped = flattened(strategy)
    for unit in [] if wrapped is None else FullyShardedDataParallel.fsdp_modules(wrapped):
        handle = unit._handle  # noqa: SLF001  nothing public drops it
        if handle is not None and hasattr(handle.flat_param, "_full_param_padded"):  # else there was no forward yet
            handle.reshard(free_unsharded_flat_param=True)
    for part in [] if strategy.lightning_module is None else strategy.lightning_module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def model_state(strategy: Strategy) -> dict[str, torch.Tensor]:
    """The live state dictionary of the model. Collective with FSDP, which copies its shards."""
    wrapped = flattened(strategy)
    if wrapped is not None:
        with _in_shards(wrapped):
            return dict(wrapped.state_dict())
    module = strategy.lightning_module
    return {} if module is None else dict(module.state_dict())


@contextmanager
def kept_in_place(strategy: Strategy, *, optimizers: bool = True) -> Iterator[None]:
    """While it lasts, ``strategy`` hands over the live tensors of model and optimizers when a checkpoint is made.

    What is collective of that is done at once, before any hook of the user is called: one that raises on some ranks would
    leave the others waiting.

    Args:
        strategy: Of the trainer.
        optimizers: Whether their states will be asked for.
    """
    if not shards_state(strategy):
        yield
        return
    state_of = partial(_optimizer_state, strategy)
    mine: dict[str, Any] = {
        "lightning_module_state_dict": lambda: model_state(strategy),
        "optimizer_state": lambda optimizer: state_of(_unwrapped(optimizer)),
    }
    if flattened(strategy) is not None:
        model = model_state(strategy)
        states = {id(optimizer): state_of(optimizer) for optimizer in strategy.optimizers if optimizers}
        mine = {
            "lightning_module_state_dict": lambda: model,
            "optimizer_state": lambda optimizer: states[id(_unwrapped(optimizer))],
        }
    vars(strategy).update(mine)
    try:
        yield
    finally:
        for name in mine:
            vars(strategy).pop(name)


def is_kept_in_place(strategy: Strategy) -> bool:
    """Whether that is so now."""
    return "lightning_module_state_dict" in vars(strategy)


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
    wrapped = flattened(strategy)
    if wrapped is not None:
        with _in_shards(wrapped):
            wrapped.load_state_dict(dict(state), strict=strict)
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
    wrapped = flattened(strategy)
    for optimizer, state, name_of in zip(optimizers, states, names, strict=False):
        if wrapped is not None:
            with _in_shards(wrapped):
                state = FullyShardedDataParallel.optim_state_dict_to_load(wrapped, optimizer, _by_name(state, name_of))
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


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    return inner


def _optimizer_state(strategy: Strategy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    wrapped = flattened(strategy)
    if wrapped is None:
        state: dict[str, Any] = optimizer.state_dict()
        return state
    with _in_shards(wrapped):
        named = FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)
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
