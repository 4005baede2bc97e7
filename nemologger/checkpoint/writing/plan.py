"""What every rank writes, and where: decided once for a run, the same in every save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
import xxhash

from nemologger import names
from nemologger.checkpoint.state.collector import without_collector
from nemologger.checkpoint.state.shards import held, local, part_of
from nemologger.checkpoint.state.shares import Part, Piece, into_files, share_of
from nemologger.checkpoint.state.snapshot import Snapshot, is_of_optimizer
from nemologger.checkpoint.weights import Entry, Place, entries, lay_out
from nemologger.checkpoint.writing.directories import by_directory, metadata_files
from nemologger.errors import CheckpointError
from nemologger.ranks import Ranks, decide, together_at_zero


@dataclass(frozen=True)
class Plan:
    """One rank's plan.

    Attributes:
        outline: Of the snapshots that it is for.
        parts: What this rank holds of each tensor.
        files: For each of its files, by its path below the checkpoint, the places of its pieces.
        metadata: ``.metadata`` of all ranks for each directory, by its path below the checkpoint; on rank 0 only.
    """

    outline: str
    parts: Mapping[str, Part]
    files: Mapping[str, list[Place]]
    metadata: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's files, about."""
        return sum(place.end - place.start for places in self.files.values() for place in places)

    def reader(self, snapshot: Snapshot) -> Callable[[Piece], torch.Tensor]:
        """What gives the values of a piece, as a view of the live tensor."""
        tensors, parts = snapshot.tensors, self.parts
        return lambda piece: part_of(local(tensors[piece.key]), piece, parts[piece.key].offsets)


class Planner:
    """Makes plans, and keeps the latest.

    Args:
        ranks: The processes that write together.
        files_per_rank: At most so many ``.distcp`` files for each rank.
        apart: No file holds both model and optimizer; there is at least one of each.
    """

    def __init__(self, ranks: Ranks, files_per_rank: int = 2, *, apart: bool = False) -> None:
        self._ranks = ranks
        self._files_per_rank = files_per_rank
        self._apart = apart
        self._plan: Plan | None = None

    @without_collector()
    def plan(self, snapshot: Snapshot) -> Plan:
        """The plan for ``snapshot``. Collective; without a new plan, one short exchange.

        Raises:
            CheckpointError: On every rank, if the ranks do not hold the same tensors, or one cannot be written.
        """
        outline = snapshot.outline(shared=self._ranks.rank != 0)
        plan = self._plan
        known = plan is not None and plan.outline == outline
        if self._ranks.exchange(known, all) and plan is not None:
            return plan
        mine: list[tuple[dict[str, Part], dict[str, list[Place]]]] = []
        # Of tensors that it alone writes, the other ranks may have none, or another size.
        reserved = decide(self._ranks, lambda: _rank_zeros_bytes(snapshot))

        def lay() -> tuple[str, list[Entry]]:
            parts = {key: held(tensor, key) for key, tensor in snapshot.tensors.items()}
            rank, world_size = self._ranks.rank, self._ranks.world_size
            files = files_of(
                rank, world_size, parts, snapshot, self._files_per_rank, apart=self._apart, reserved=reserved
            )
            mine.append((parts, files))
            return xxhash.xxh3_64_hexdigest(snapshot.outline(shared=True).encode()), entries_of(files)

        shares = together_at_zero(self._ranks, lay)
        described = together_at_zero(self._ranks, lambda: _described(snapshot, shares))
        self._plan = Plan(outline, *mine[0], described[0] if described else {})
        return self._plan


def _rank_zeros_bytes(snapshot: Snapshot) -> int:
    return sum(tensor.nbytes for key, tensor in snapshot.tensors.items() if snapshot.is_rank_zeros(key))


def files_of(
    rank: int,
    world_size: int,
    parts: Mapping[str, Part],
    snapshot: Snapshot,
    files_per_rank: int,
    *,
    apart: bool = False,
    reserved: int | None = None,
) -> dict[str, list[Place]]:
    """The files of ``rank``, and the places of the pieces in each."""
    pieces = share_of(rank, world_size, parts, snapshot.rank_zero, reserved)
    return {
        f"{directory}/{names.shard(rank, i)}": lay_out(group, snapshot.tensors)
        for directory, own in by_directory(pieces).items()
        for i, group in enumerate(_grouped(own, files_per_rank, apart=apart))
    }


def _grouped(pieces: Sequence[Piece], count: int, *, apart: bool) -> list[list[Piece]]:
    optimizer = [piece for piece in pieces if is_of_optimizer(piece.key)]
    model = [piece for piece in pieces if not is_of_optimizer(piece.key)]
    if not (apart and optimizer and model):
        return into_files(pieces, count)
    return [*into_files(model, max(count // 2, 1)), *into_files(optimizer, max(count - count // 2, 1))]


def entries_of(files: Mapping[str, list[Place]]) -> list[Entry]:
    """What ``.metadata`` says of ``files``."""
    return [entry for name, places in files.items() for entry in entries(PurePosixPath(name).name, places)]


def _described(snapshot: Snapshot, shares: list[tuple[str, list[Entry]]]) -> dict[str, bytes]:
    """``.metadata`` of each directory, on rank 0."""
    different = [rank for rank, (outline, _) in enumerate(shares) if outline != shares[0][0]]
    if different:
        raise CheckpointError(
            f"ranks {different} hold other tensors than rank 0 (names, shapes, dtypes or sharding differ): the model or its "
            "optimizer is not the same on all ranks"
        )
    return metadata_files(snapshot, (entry for _, share in shares for entry in share)) if shares else {}
