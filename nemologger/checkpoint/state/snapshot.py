"""What one checkpoint holds: tensors under flat keys, and everything else as plain types.

The flat scheme of ``weights/``:

* ``state_dict.<name>`` for every tensor of the model's state dictionary;
* ``optimizer.<i>.state.<parameter name>.<field>`` for every tensor of the ``i``-th optimizer's state. Names, not indices:
  they mean the same on another number of ranks, and to other tools. Where a field is a dictionary, list or tuple, key or
  index follow. What an optimizer that wraps another keeps beside ``state`` has the names that it gives it.

A callback of ours may add other weights of the same model, such as averages, to the checkpoint dictionary
(:class:`OtherWeights`): they go to a directory of their own beside ``weights/``, in the same scheme (:data:`BESIDE`). Among
all tensors of a snapshot their flat keys begin with that directory and a slash. What somebody else keeps under such a key is
theirs, and stays in the dictionary.

The rest keeps the shape of Lightning's checkpoint dictionary and goes to ``common.pt``; where a tensor was taken out of
an optimizer's state, a reference to its flat key stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from nemologger import names
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.plain import TAG, Encoder, can_be_written, decode, is_made_of_others
from nemologger.checkpoint.state.shards import PLAIN, is_sharded, local
from nemologger.errors import CheckpointError

MODEL = "state_dict"
OPTIMIZER = "optimizer"
OPTIMIZERS = "optimizer_states"
#: Other weights of the model: their key in Lightning's checkpoint dictionary, and their directory in a checkpoint of ours.
EMA_STATE = "ema_state_dict"
BESIDE = {EMA_STATE: names.EMA_WEIGHTS}


class OtherWeights(dict[str, Any]):
    """A state dictionary for a directory of its own: a program may use the keys of :data:`BESIDE` for something else."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file of Lightning it is a dictionary that ``torch.load(weights_only=True)`` knows."""
        return OrderedDict, (), None, None, iter(self.items())


@dataclass(frozen=True)
class Snapshot:
    """The state of a run between two steps.

    Attributes:
        tensors: The live tensors, by flat key.
        paths: For each flat key, its place in a nested dictionary; what ``torch.distributed.checkpoint`` rebuilds.
        rank_zero: The keys whose value is rank 0's own: buffers, which data-parallel ranks hold different values of.
        may_change: The keys whose value may change before an optimizer steps: buffers, and parameters that none trains.
        common: Everything else, as plain types.
        left_out: ``path -> why`` of values that have no plain form.
        places: The paths of those that the program has, and where.
        optimizer_names: For each optimizer, the parameter name behind each index.
        beside: For each directory besides ``weights/``, what its ``common.pt`` holds.
    """

    tensors: dict[str, torch.Tensor]
    paths: dict[str, tuple[str, ...]]
    rank_zero: frozenset[str] = frozenset()
    may_change: frozenset[str] = frozenset()
    common: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    optimizer_names: list[dict[int, str]] = field(default_factory=list)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, tuple[str | int, ...]] = field(default_factory=dict)

    @property
    def directories(self) -> tuple[str, ...]:
        """The directories that the tensors go to; ``weights/`` first."""
        return (names.WEIGHTS, *self.beside)

    def within(self, directory: str) -> tuple[dict[str, torch.Tensor], dict[str, tuple[str, ...]]]:
        """The tensors and paths of one of the :attr:`directories`, under the keys that they have in it."""
        stored = {key: inside for key in self.tensors for home, inside in [home_of(key)] if home == directory}
        return (
            {inside: self.tensors[key] for key, inside in stored.items()},
            {inside: self.paths[key] for key, inside in stored.items()},
        )

    @property
    def has_optimizer(self) -> bool:
        """Whether training can go on from it."""
        return OPTIMIZERS in self.common

    def is_rank_zeros(self, key: str) -> bool:
        """Whether only rank 0 writes the tensor, so that others may have another one, or none."""
        return key in self.rank_zero and not is_sharded(self.tensors[key])

    def outline(self, *, shared: bool) -> str:
        """Keys, shapes, dtypes and sharding, which stay the same from save to save.

        Args:
            shared: Only of those tensors that must agree between ranks.
        """
        return repr(
            [
                (key, tuple(t.shape), t.dtype, key in self.rank_zero, getattr(t, "placements", None))
                for key, t in self.tensors.items()
                if not (shared and self.is_rank_zeros(key))
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are here, as they are stored."""
        return sum(local(tensor).nbytes for tensor in self.tensors.values())


@without_collector()
def take(
    checkpoint: Mapping[str, Any],
    parameter_names: frozenset[str] | None = None,
    optimizer_names: list[dict[int, str]] | None = None,
    trained_names: frozenset[str] | None = None,
    place: Callable[[Any], tuple[str | int, ...] | None] = lambda value: None,
) -> Snapshot:
    """Split Lightning's checkpoint dictionary into a :class:`Snapshot`. No tensor is copied.

    Args:
        checkpoint: The dictionary, with the model under ``state_dict`` and optimizers under ``optimizer_states``.
        parameter_names: The keys of ``state_dict`` that are parameters; default all.
        optimizer_names: For each optimizer, the parameter name behind each index; default the index itself.
        trained_names: The keys of ``state_dict`` that nothing but an optimizer's step changes; default ``parameter_names``.
        place: Where the program has an object, if it does.
    """
    tensors: dict[str, torch.Tensor] = {}
    paths: dict[str, tuple[str, ...]] = {}
    encoder = Encoder(place)
    others = {key: directory for key, directory in BESIDE.items() if isinstance(checkpoint.get(key), OtherWeights)}
    rest = {key: value for key, value in checkpoint.items() if key not in (MODEL, OPTIMIZERS, *others)}

    def take_weights(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Take the tensors; what is left."""
        extra: dict[str, Any] = {}
        for name, value in state_dict.items():
            key = f"{prefix}{MODEL}.{name}"
            if _has_values(value, key):
                tensors[key], paths[key] = value, (MODEL, name)
            else:
                extra[name] = value
        return extra

    extra = take_weights(checkpoint.get(MODEL, {}))
    beside = {
        directory: {MODEL: encoder.encode(take_weights(checkpoint[key], f"{directory}/"), key)}
        for key, directory in others.items()
    }

    def keys_besides(known: frozenset[str] | None) -> frozenset[str]:
        return frozenset(key for key, (_, name) in paths.items() if known is not None and name not in known)

    rank_zero = keys_besides(parameter_names)
    may_change = rank_zero | keys_besides(trained_names)
    common = encoder.encode(rest)
    common[MODEL] = encoder.encode(extra, MODEL)
    if OPTIMIZERS in checkpoint:
        common[OPTIMIZERS] = [
            _take_optimizer(i, state, (optimizer_names or [{}] * (i + 1))[i], tensors, paths, encoder)
            for i, state in enumerate(checkpoint[OPTIMIZERS])
        ]
    names_of = list(optimizer_names or [])
    return Snapshot(tensors, paths, rank_zero, may_change, common, encoder.left_out, names_of, beside, encoder.places)


def home_of(key: str) -> tuple[str, str]:
    """The directory that a tensor goes to, and its key in there."""
    directory, slash, inside = key.partition("/")
    return (directory, inside) if slash and directory in BESIDE.values() else (names.WEIGHTS, key)


def is_of_optimizer(key: str) -> bool:
    """Whether the tensor under this flat key is part of an optimizer's state."""
    return key.startswith(f"{OPTIMIZER}.")


def _take_optimizer(
    index: int,
    state_dict: Mapping[str, Any],
    names: dict[int, str],
    tensors: dict[str, torch.Tensor],
    paths: dict[str, tuple[str, ...]],
    encoder: Encoder,
) -> Any:
    def take_tensor(tensor: torch.Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        key = ".".join(path)
        if key in tensors:
            raise CheckpointError(f"two tensors of the optimizer's state are called {key}: rename one of them")
        tensors[key], paths[key] = tensor, path
        order = None if is_sharded(tensor) or tensor.is_contiguous() else _order_of(tensor)
        return {TAG: "tensor", "key": key, **({} if order is None else {"order": order})}

    begin = (OPTIMIZER, str(index), "state")
    state = {
        number: _without_tensors(value, (*begin, names.get(number, str(number))), take_tensor, encoder)
        for number, value in state_dict.get("state", {}).items()
    }
    rest = {key: value for key, value in state_dict.items() if key != "state"}
    if "param_groups" in rest:
        plain = encoder.encode(rest, f"optimizer_states[{index}]")
    else:
        plain = _without_tensors(rest, begin[:2], take_tensor, encoder)
    return {"state": state, **plain} if "state" in state_dict else plain


def _without_tensors(
    value: Any, path: tuple[str, ...], take: Callable[[torch.Tensor, tuple[str, ...]], Any], encoder: Encoder
) -> Any:
    """The plain form of ``value``, where ``take`` has the tensors, and says what stands in their place."""
    # No function in another that calls itself: that is a reference cycle, and would keep all tensors of every save.
    if _has_values(value, ".".join(path)):
        return take(value, path)
    if type(value) is dict and all(type(name) in (str, int) for name in value):
        return {name: _without_tensors(item, (*path, str(name)), take, encoder) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(item, (*path, str(i)), take, encoder) for i, item in enumerate(value))
    return encoder.encode(value, ".".join(path))


def _order_of(tensor: torch.Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest, if it has no gaps: what is computed of it depends on that."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: strides[dim], reverse=True)
    return order if tensor.permute(*order).is_contiguous() else None


def is_stored(value: Any) -> bool:
    """Whether ``value`` is a tensor for ``weights/``; sparse, nested and quantized ones go to ``common.pt``."""
    if is_sharded(value):
        return True
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested or _is_made_of_others(value))
    )


def check_form(state: Mapping[str, Any], prefix: str = "") -> None:
    """Whether the tensors of ``state`` are such that they can be saved.

    Raises:
        CheckpointError: If one is not; it names it. ``prefix`` comes before its key.
    """
    for name, value in state.items():
        if _is_made_of_others(local(value) if is_sharded(value) else value):
            raise CheckpointError(
                f"{prefix}{name} is a {type(value).__name__}, a tensor made of others, which a checkpoint cannot hold: put "
                "plain tensors in its place, in the model before it is trained, or in its state dictionary by a hook"
            )
        if isinstance(value, torch.Tensor) and not can_be_written(value.dtype):
            raise CheckpointError(
                f"{prefix}{name} is of {value.dtype}, which torch.save cannot write: keep its bytes as torch.uint8, and "
                "look at them with view()"
            )


def _is_made_of_others(value: Any) -> bool:
    # Quantized by torchao, say. Hardly ever one is, and there may be very many to ask about.
    # What a collective has yet to deliver is such a tensor too, and waits when it is read.
    return type(value) not in PLAIN and is_made_of_others(value) and not isinstance(value, AsyncCollectiveTensor)


def _has_values(value: Any, key: str) -> bool:
    check_form({key: value})
    if (
        isinstance(value, torch.Tensor)
        and not is_sharded(value)
        and (value.is_meta or torch.nn.parameter.is_lazy(value))
    ):
        raise CheckpointError(f"{key} has no values yet (a meta or lazy tensor): run a forward before the first save")
    return is_stored(value)


def restore(common: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Lightning's checkpoint dictionary again, from what :func:`take` made of it."""

    checkpoint: dict[str, Any] = decode({key: value for key, value in common.items() if key not in (MODEL, OPTIMIZERS)})
    prefix = f"{MODEL}."
    checkpoint[MODEL] = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    checkpoint[MODEL].update(decode(common.get(MODEL, {})))
    if OPTIMIZERS in common:
        checkpoint[OPTIMIZERS] = [_fill(state, tensors) for state in common[OPTIMIZERS]]
    return checkpoint


def _fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What :func:`_without_tensors` was given."""
    if isinstance(value, dict):
        if value.get(TAG) == "tensor":
            return _in_order(tensors[value["key"]], value.get("order"))
        if TAG in value:
            return decode(value)
        return {key: _fill(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fill(item, tensors) for item in value)
    return decode(value)


def _in_order(tensor: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    if order is None or is_sharded(tensor) or sorted(order) != list(range(tensor.dim())):
        return tensor
    places = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.permute(*order).contiguous().permute(*places)
