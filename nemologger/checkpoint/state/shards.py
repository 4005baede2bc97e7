"""The part of a tensor that this rank holds: all of it, or a shard of FSDP's or tensor parallelism's."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nemologger.checkpoint.state.shares import Part, Piece, Shape
from nemologger.errors import CheckpointError

#: What has memory of its own, and nothing else to it: that is nearly all there is, and there may be very many.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` that are here, without a copy: of a plain tensor all, of a sharded one this rank's part."""
    if type(tensor) in PLAIN:
        return tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    if hasattr(tensor, "local_shards"):  # torch's ShardedTensor
        shards = tensor.local_shards()
        return shards[0].tensor.detach() if shards else torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)
    return tensor.detach()


def held(tensor: torch.Tensor, key: str) -> Part:
    """Where :func:`local` lies in ``tensor``, and who else holds it.

    Args:
        tensor: A plain tensor, a DTensor (FSDP2, tensor parallelism) or a ShardedTensor (FSDP).
        key: What to call it in errors.

    Raises:
        CheckpointError: If it is sharded in a way that cannot be written: a pending sum, or parts that are not blocks.
    """
    if type(tensor) in PLAIN:
        return Part(Shape(tuple(tensor.shape), tensor.element_size()), (0,) * tensor.dim())
    if isinstance(tensor, DTensor):
        return _of_dtensor(tensor, key)
    if hasattr(tensor, "local_shards"):
        shards = tensor.local_shards()
        offsets = tuple(shards[0].metadata.shard_offsets) if shards else (0,) * tensor.dim()
        return Part(_shape(tensor), offsets, (dist.get_rank(),) if shards else ())
    return Part(_shape(tensor), (0,) * tensor.dim())


def part_of(tensor: torch.Tensor, piece: Piece, origin: tuple[int, ...] | None = None) -> torch.Tensor:
    """The view of ``tensor`` that ``piece`` is.

    Args:
        tensor: All of a tensor, or a part of it.
        piece: What is wanted, in the coordinates of the whole.
        origin: Where ``tensor`` begins in the whole; default at its beginning.
    """
    if tensor.shape == piece.sizes:
        return tensor
    for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
        if size != tensor.shape[dimension]:
            tensor = tensor.narrow(dimension, offset - (origin[dimension] if origin else 0), size)
    return tensor


def part_here(whole: torch.Tensor, template: torch.Tensor, key: str) -> torch.Tensor:
    """This rank's part of ``whole``, if it is to be sharded as ``template`` is; ``key`` is for errors."""
    part = held(template, key)
    return part_of(whole, Piece(key, part.offsets, part.shape.sizes, part.shape.nbytes)).contiguous()


def sharded_like(values: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """A tensor that is sharded, and lies, as ``template`` does; ``values`` are this rank's part of it."""
    if isinstance(template, DTensor):
        return DTensor.from_local(
            values.to(template.device),
            template.device_mesh,
            template.placements,
            run_check=False,
            shape=template.shape,
            stride=template.stride(),
        )
    made = torch.empty_like(template, dtype=values.dtype)
    for shard in cast(Any, made).local_shards():
        shard.tensor.copy_(values)
    return made


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a tensor that :func:`local` may return a part of."""
    return type(tensor) not in PLAIN and (isinstance(tensor, DTensor) or hasattr(tensor, "local_shards"))


def _shape(tensor: torch.Tensor) -> Shape:
    here = local(tensor)
    return Shape(tuple(here.shape), here.element_size())


def _of_dtensor(tensor: DTensor, key: str) -> Part:
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError(f"{key} is a sum that the ranks have yet to make ({placements}): redistribute it first")
    shape, origin = _shape(tensor), (0,) * tensor.dim()
    if all(placement.is_replicate() for placement in placements) and mesh.size() == dist.get_world_size():
        return Part(shape, origin)
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # a mesh of other ranks
        return Part(shape, origin, ())
    chunk = cast(Any, tensor).__create_chunk_list__()[0]  # torch's own hook for distributed checkpoints
    if tuple(chunk.sizes) != shape.sizes:
        raise CheckpointError(
            f"{key}, sharded {placements} over {mesh}, has parts that are not blocks of it: choose sizes that the number of "
            "ranks divides"
        )
    places = [
        slice(None) if placement.is_replicate() else at for placement, at in zip(placements, coordinate, strict=True)
    ]
    holders = mesh.mesh[tuple(places)].flatten().tolist()
    return Part(shape, tuple(chunk.offsets), tuple(sorted(holders)))
